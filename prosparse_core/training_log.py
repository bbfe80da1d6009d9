"""What a stage writes down while it trains, in its folder: a line a step, a line a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_LOG = "checkpoints.jsonl"
"""What each checkpoint of the stage cost."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of the training log."""

    stage: int
    step: int
    tokens: int
    l1_lambda: float
    lr: float
    lm_loss: float
    l1: float
    """The reduced |x1| (see ``l1_reduction``), without lambda."""
    l1_term: float
    """lambda * l1: what is added to the loss."""
    mean_abs_x1: float
    sparsity: float
    grad_norm: float
    distill: float | None
    """KL from the dense original (times temperature^2) per token, without its weight; None without distillation."""
    tokens_per_s: float
    wall_s: float
    skipped: str | None = None
    """Why this step left the weights as they were; None: it did not. Numbers of a step that a rollback passed over are
    nan."""


def last_lambda(folder: Path) -> float:
    """The factor of the last step that the log of a stage tells of; 0 where there is none."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["l1_lambda"]) if lines else 0.0


def cut_log(path: Path, before: int) -> None:
    """Keep only whole lines of steps before ``before``: the others are about to be run again."""
    if not path.is_file():
        return
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] < before:
            kept.append(entry)
    path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
