"""The weights of a mixture: as exact shares of a block of samples, and checked stage by stage."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from prosparse_core.errors import BadInput
from prosparse_core.recipe_train import Stage

BLOCK = 1024
"""Samples in which every corpus has exactly its share."""


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples of each corpus in a block of ``BLOCK``: its share of the weights, by the largest remainder.

    Raises:
        BadInput: a weight above 0 that is too small to get one sample.
    """
    whole = sum(weights.values())
    exact = [weight / whole * BLOCK for weight in weights.values()]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise BadInput(
                f"source {name!r}: weight={weight} is less than 1/{BLOCK} of all weights: never sampled",
                hint="raise the weight, or set it to 0 to measure on this corpus without training on it",
            )
    return dict(zip(weights, counts, strict=True))


def mixture_problems(weights: Mapping[str, float], stages: Sequence[Stage]) -> list[str]:
    """What is wrong with the stages' own mixtures; ``weights`` are those of ``data.sources``."""
    found = []
    for i, stage in enumerate(stages):
        place = f"train.stages[{i}].mixture"
        if stage.mixture is None:
            continue
        for name in stage.mixture.keys() - weights.keys():
            near = difflib.get_close_matches(name, weights, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"data.sources has {', '.join(weights)}"
            found.append(f"{place}: unknown corpus {name!r}; {known}")
        try:
            block_counts(stage.mixture)
        except BadInput as error:
            found.append(f"{place}: {error}")
    return found


def trained_corpora(weights: Mapping[str, float], stages: Sequence[Stage]) -> list[str]:
    """The corpora that some stage takes samples of, in the order of ``weights``: these need training windows.

    Without stages: those with a weight.
    """
    mixtures = [stage.mixture or weights for stage in stages] or [weights]
    taken = {name for mixture in mixtures for name, weight in mixture.items() if weight > 0}
    return [name for name in weights if name in taken]
