"""Thresholds that are set for timing alone: of a model that decodes in turns by several, and raised ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class SwitchedThresholds:
    """Gives a model FATReLU whose thresholds can be set; at 0 that is ReLU."""

    def __init__(self, model: nn.Module) -> None:
        from prosparse_core.decode import ffn_thresholds
        from prosparse_core.families import find_ffns
        from prosparse_core.substitute import use_thresholds

        self._ffns = find_ffns(model)
        self._original = [ffn.activation for ffn in self._ffns]
        use_thresholds(model, ffn_thresholds(model))
        self._activations: list[Any] = [ffn.activation for ffn in self._ffns]

    def __call__(self, thresholds: Sequence[float]) -> None:
        for activation, threshold in zip(self._activations, thresholds, strict=True):
            activation.threshold = threshold

    def undo(self) -> None:
        for ffn, activation in zip(self._ffns, self._original, strict=True):
            ffn.swap_activation(activation)


def raised_thresholds(model: nn.Module, thresholds: Sequence[float], tokens: Tensor, sparsity: float) -> list[float]:
    """Thresholds that let at most ``1 - sparsity`` of the gates of each layer live on ``tokens`` [1, n], none lowered.

    One forward pass, layer by layer: each is raised on what the layers before it leave.
    """
    import torch

    from prosparse_core.families import find_ffns

    raised = list(thresholds)

    def raise_layer(layer: int, gate: Tensor) -> Tensor:
        ordered = gate.float().flatten().sort().values
        at = min(round(sparsity * len(ordered)), len(ordered) - 1)
        raised[layer] = max(raised[layer], float(ordered[at]))
        return torch.where(gate >= raised[layer], gate, torch.zeros_like(gate)) if raised[layer] > 0 else gate

    handles = [
        ffn.first.register_forward_hook(lambda _, __, out, layer=ffn.layer: raise_layer(layer, out))
        for ffn in find_ffns(model)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return raised
