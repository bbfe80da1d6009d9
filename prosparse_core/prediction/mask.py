"""FFNs that compute only what their predictors call active: what a predictor's errors cost, in perplexity.

x1 is set to zero where the predictor says inactive, whatever it was: the numbers of an engine that skips those neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from prosparse_core.document_masks import Packed
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.perplexity import Measured, measure
from prosparse_core.precision import Precision
from prosparse_core.prediction.input import Input, input_module
from prosparse_core.predictor import LayerPredictor


class PredictedMask:
    """While open, x1 of every layer is zero wherever its predictor gives a probability below the layer's cutoff.

    A context manager; the model is as before when it is left. Predictors run in fp32, whatever the model runs in.
    """

    def __init__(
        self, model: nn.Module, predictors: Sequence[LayerPredictor], cutoffs: Sequence[float], source: Input
    ) -> None:
        ffns = find_ffns(model)
        if not len(ffns) == len(predictors) == len(cutoffs):
            raise BadInput(f"{len(predictors)} predictors and {len(cutoffs)} cutoffs for {len(ffns)} layers")
        self._device = next(model.parameters()).device.type
        self._predictors = [p.to(self._device) for p in predictors]
        self._logits = [logit(c) for c in cutoffs]
        self._active: list[Tensor | None] = [None] * len(ffns)
        self._handles = [
            handle
            for f in ffns
            for handle in (
                input_module(model, f, source).register_forward_pre_hook(
                    lambda _, args, layer=f.layer: self._on_input(layer, args[0])
                ),
                f.down.register_forward_pre_hook(lambda _, args, layer=f.layer: self._on_down(layer, args[0])),
            )
        ]

    def __enter__(self) -> PredictedMask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._active = [None] * len(self._active)

    def _on_input(self, layer: int, x: Tensor) -> None:
        with torch.autocast(self._device, enabled=False):
            self._active[layer] = self._predictors[layer](x.float()) >= self._logits[layer]

    def _on_down(self, layer: int, x1: Tensor) -> tuple[Tensor]:
        active = self._active[layer]
        assert active is not None, "the predictor's input comes before the FFN's output projection"
        return (torch.where(active.view(x1.shape), x1, torch.zeros((), dtype=x1.dtype, device=x1.device)),)


def logit(probability: float) -> float:
    """The score whose sigmoid is ``probability``; 0 at one half, infinite at 0 and 1."""
    if probability <= 0 or probability >= 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))


def measure_windows(
    model: nn.Module, windows: Sequence[Tensor | Packed], precision: Precision, batch_size: int = 4
) -> Measured:
    """Perplexity and sparsity over windows [1, length] of any lengths, each on its own; neighbours of one length share
    a forward pass. Every token of a window but the first counts."""
    parts: list[tuple[Measured, int]] = []
    packed = [Packed.of(window) for window in windows]
    start = 0
    for end in range(1, len(packed) + 1):
        if end == len(packed) or end - start == batch_size or packed[end].tokens.shape != packed[start].tokens.shape:
            tokens = torch.cat([window.tokens for window in packed[start:end]])
            places = [window.positions for window in packed[start:end] if window.positions is not None]
            positions = torch.cat(places) if places else None
            measured = measure(model, tokens, tokens, positions, precision=precision, batch_size=batch_size)
            parts.append((measured, tokens.numel()))
            start = end
    forwarded = sum(n for _, n in parts)
    return Measured(
        nll=sum(m.nll for m, _ in parts),
        num_tokens=sum(m.num_tokens for m, _ in parts),
        sparsity=sum(m.sparsity * n for m, n in parts) / forwarded,
    )
