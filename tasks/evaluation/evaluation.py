"""What one model scored, in all that was measured of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import EnvironmentProblem
from tasks.evaluation.held_out import CHOICES_TASK, Score

if TYPE_CHECKING:
    from prosparse_core.sparsity import LayerSparsity


@dataclass(frozen=True)
class Evaluation:
    """What one model scored, with the conditions that belong to every number."""

    scores: tuple[Score, ...]
    layers: Mapping[str, Sequence[LayerSparsity]]
    """Per corpus, from the forward passes of its perplexity; every forwarded position counts, padding does not."""
    conditions: Mapping[str, Any]
    """precision, batch_size, max_length, prefix, limit, harness_version."""
    raw: Mapping[str, Any]
    """lm-eval's own results by task."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each benchmark took."""

    @property
    def perplexity(self) -> dict[str, float | None]:
        """Token perplexity by corpus."""
        return {s.corpus: s.value for s in self.scores if s.corpus and s.metric == "token_perplexity"}

    @property
    def sparsity(self) -> dict[str, float]:
        """Mean over layers by corpus."""
        return {corpus: sum(s.sparsity for s in layers) / len(layers) for corpus, layers in self.layers.items()}

    @property
    def accuracy(self) -> dict[str, float | None]:
        """acc of the held-out questions; benchmarks have rows of their own."""
        return {s.task: s.value for s in self.scores if s.task == CHOICES_TASK and s.metric == "acc"}


def together(parts: Sequence[Evaluation]) -> Evaluation:
    """Measurements of one model as one; conditions they share are said once."""
    raw: dict[str, dict[str, Any]] = {}
    add_raw(raw, *(part.raw for part in parts))
    return Evaluation(
        scores=tuple(score for part in parts for score in part.scores),
        layers={corpus: layers for part in parts for corpus, layers in part.layers.items()},
        conditions={key: value for part in parts for key, value in part.conditions.items()},
        raw=raw,
        seconds={name: value for part in parts for name, value in part.seconds.items()},
    )


def add_raw(raw: dict[str, dict[str, Any]], *further: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the harness's results of further tasks, section by section."""
    for results in further:
        for section, entries in results.items():
            raw.setdefault(section, {}).update(entries)


def harness_version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem("lm-eval is not installed", hint="make setup installs everything") from None
