"""FATReLU thresholds as a calibration leaves them: which rule chose them, and which checkpoint they belong to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.store import RECORD, read_record

THRESHOLDS = "thresholds.json"
"""File of a calibration artifact: {"per_layer": [...], "rule": ..., "threshold": best for all layers, ...}."""
_AGAIN = "run the recipe again: its calibrate step makes thresholds for this model"


@dataclass(frozen=True)
class Thresholds:
    """One threshold per layer, and what else is known of them."""

    path: Path
    per_layer: tuple[float, ...]
    best_global: float | None
    """The best single threshold within the same budget, for formats that can carry only one; None: not measured."""
    checkpoint: str | None
    """Digest of the checkpoint they were calibrated on; None: not recorded."""

    @property
    def is_global(self) -> bool:
        """Whether one number says it all."""
        return len(set(self.per_layer)) == 1

    def require(self, *, num_layers: int, checkpoint: str | None) -> None:
        """Refuse to serve another model.

        Raises:
            BadInput: calibrated on another checkpoint, or as many thresholds as the model has not layers.
        """
        if len(self.per_layer) != num_layers:
            raise BadInput(
                f"{self.path} holds {len(self.per_layer)} thresholds, but the model has {num_layers} layers",
                hint=_AGAIN,
            )
        if self.checkpoint and checkpoint and self.checkpoint != checkpoint:
            raise BadInput(
                f"the thresholds in {self.path} were calibrated on the checkpoint {self.checkpoint[:12]}, "
                f"but the model is {checkpoint[:12]}",
                hint=_AGAIN,
            )


def read_thresholds(folder: Path) -> Thresholds:
    """The thresholds of a calibration artifact.

    Raises:
        BadInput: no readable file there, or it does not hold finite thresholds of at least 0.
    """
    path = folder / THRESHOLDS
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as thresholds: {error}", hint=_AGAIN) from error
    per_layer = found.get("per_layer") if isinstance(found, dict) else None
    if not isinstance(per_layer, list) or not per_layer or not all(map(_is_threshold, per_layer)):
        raise BadInput(
            f"{path}: per_layer is {json.dumps(per_layer)[:80]}; it must be a list of finite numbers of at least 0",
            hint=_AGAIN,
        )
    best = found.get("threshold")
    checkpoint = found.get("checkpoint")
    if checkpoint is None and (folder / RECORD).is_file():
        checkpoint = read_record(folder)["inputs"].get("checkpoint", {}).get("digest")
    return Thresholds(
        path,
        tuple(float(t) for t in per_layer),
        float(best) if _is_threshold(best) else None,
        None if checkpoint is None else str(checkpoint),
    )


def _is_threshold(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
