"""lambda(step) and lr(step): pure functions of the step, 1-based as in Algorithm 1 (paper, App. B)."""

from __future__ import annotations

import math
from collections.abc import Callable

from prosparse_core.recipe_train import Stage, Train


def stage_of(stages: list[Stage], step: int) -> int:
    """The index of the stage that step ``step`` (1 .. last until_step) belongs to."""
    for index, stage in enumerate(stages):
        if step <= stage.until_step:
            return index
    raise ValueError(f"step {step} lies beyond the last stage, which ends at step {stages[-1].until_step}")


def first_step(stages: list[Stage], index: int) -> int:
    """The first step (1-based) of a stage."""
    return 1 if index == 0 else stages[index - 1].until_step + 1


def l1_lambda(stages: list[Stage], step: int) -> float:
    """The regularization factor at a step; 0 in a stage that steers it (``target_sparsity``, see steering.py).

    A constant stage is flat; in the others lambda goes from the factor of the stage before to its own, reaching it at
    the last step: ``before + ease(share) * (own - before)``, where the paper's ease is half a sine.
    """
    index = stage_of(stages, step)
    stage = stages[index]
    if stage.ramp == "constant" or index == 0 or step == stage.until_step:
        return stage.l1
    before = stages[index - 1]
    share = (step - before.until_step) / (stage.until_step - before.until_step)
    if stage.ramp == "exponential":
        return before.l1 * (stage.l1 / before.l1) ** share
    return before.l1 + EASES[stage.ramp](share) * (stage.l1 - before.l1)


def _sine(share: float) -> float:
    """Algorithm 1: ``eta = (sin(-pi/2 + pi * (t - T_before) / (T - T_before)) + 1) / 2``."""
    return 0.5 * (math.sin(-math.pi / 2 + math.pi * share) + 1)


EASES: dict[str, Callable[[float], float]] = {"sine": _sine, "linear": lambda share: share}
"""Share of a stage's steps -> share of the way from the factor before to its own."""


def learning_rate(train: Train, step: int) -> float:
    """The learning rate at a step: the course that ``train.schedule`` gives it, under the peak of the step's stage.

    cosine: after ``train.warmup_steps`` one cosine over the whole run, down to ``lr * lr_min_ratio`` (paper, App. L).
    constant: stays. wsd (MiniCPM, arXiv 2404.06395, section 4): stays, and falls in a stage of phase decay as
    ``lr * 0.5^(n / half_life)``, n counted from the stage's own warm-up on, never below ``lr * lr_min_ratio``; without
    a half-life it is at ``lr * lr_min_ratio`` at the stage's last step. A stage's own warm-up is linear in all of them.
    """
    index = stage_of(train.stages, step)
    stage = train.stages[index]
    peak = stage.lr or train.lr
    first = first_step(train.stages, index)
    into, steps = step - first + 1, stage.until_step - first + 1
    rising = min(1.0, into / stage.warmup_steps) if stage.warmup_steps else 1.0
    if step <= train.warmup_steps:
        return rising * (peak * step / train.warmup_steps)
    if train.schedule == "cosine":
        span = max(1, train.total_steps - train.warmup_steps)
        share = (step - train.warmup_steps) / span
        floor = peak * train.lr_min_ratio
        return rising * (floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share)))
    fallen = max(0, into - stage.warmup_steps)
    if stage.half_life:
        return rising * peak * max(0.5 ** (fallen / stage.half_life), train.lr_min_ratio)
    if train.schedule == "wsd" and stage.phase == "decay" and fallen:
        return peak * train.lr_min_ratio ** (fallen / (steps - stage.warmup_steps))
    return rising * peak
