"""What every architecture's forward pass takes, and what only some do."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def last_logits_only(model: nn.Module) -> dict[str, Any]:
    """The argument that spares the language model's head all positions but the last, where the model knows it.

    Code that comes with a checkpoint often does not; then all logits are computed, and ``logits[:, -1]`` is the same.
    """
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
