"""The bytes a run leaves in the store, and the most it needs there at once, under both rules of ``runtime.keep``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prosparse_core.planning.shapes import Weights
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_machine import Shape

TOKEN_BYTES = 5
"""A packed token and its loss mask: int32 and uint8."""


@dataclass(frozen=True)
class Disk:
    """Bytes. A stage keeps fp32 weights and, for what it trains, AdamW's two moments."""

    base_model: int
    corpora: int
    stage: int
    checkpoint: int
    """Inside a stage while it runs: as large as a stage."""
    num_checkpoints: int
    """At most, while the newest one is written; a rollback needs an older one besides."""
    stages: dict[Literal["all", "last"], int]
    """What all stages of the run leave, by rule."""
    export: int
    predictor: int
    most: dict[Literal["all", "last"], int]
    """At the fullest moment of the run, by rule."""


def disk(recipe: Recipe, s: Shape, num_stages: int | None = None, num_last: int = 1) -> Disk:
    """See the module; what evaluations, reports and recordings leave is small beside it.

    Args:
        num_stages: default: the recipe's own.
        num_last: how many of them no other stage goes on from: these keep the optimizer's state under both rules.
    """
    weights = Weights.of(s)
    moments = 8 * weights.trained("embeddings" in recipe.train.freeze)
    model = 4 * weights.all
    stage = model + moments
    number = num_stages or len(recipe.train.stages)
    corpora = TOKEN_BYTES * sum(source.max_tokens for source in recipe.data.sources)
    predictor = 4 * s.num_layers * recipe.predictor.hidden * (s.d_model + s.d_ff)
    rest = model + corpora
    num_checkpoints = 2 + recipe.train.rolls_back
    # The last stage runs beside those before it; under last the one before keeps its state until this one is done.
    kept_moments = num_last * moments
    before_last = {"all": (number - 1) * stage, "last": (number - 1) * model + (kept_moments if number > 1 else 0)}
    kept = {"all": number * stage, "last": number * model + kept_moments}
    return Disk(
        base_model=model,
        corpora=corpora,
        stage=stage,
        checkpoint=stage,
        num_checkpoints=num_checkpoints,
        stages={"all": kept["all"], "last": kept["last"]},
        export=model,
        predictor=predictor,
        most={
            "all": rest + max(before_last["all"] + num_checkpoints * stage, kept["all"] + model + predictor),
            "last": rest + max(before_last["last"] + num_checkpoints * stage, kept["last"] + model + predictor),
        },
    )
