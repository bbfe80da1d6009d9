"""FFNs that compute only what their predictors call active: what a predictor's errors cost, in perplexity.

x1 is set to zero where the predictor says inactive, whatever it was: the numbers of an engine that skips those neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.families import FFN, find_ffns
from prosparse_core.predictor import LayerPredictor

Input = Literal["pre_norm", "post_norm"]
"""What a predictor reads: the residual stream before the FFN's norm (what PowerInfer feeds), or the FFN's own input."""
_NORM = "post_attention_layernorm"
_OTHER_NORMS = {"gemma2": "pre_feedforward_layernorm", "olmo2": None}
"""By ``model_type``: where the norm before the FFN has another name, or there is none."""


def norm_before(model: nn.Module, ffn: FFN) -> nn.Module:
    """The norm whose output the FFN takes; its input is the residual stream.

    Raises:
        BadInput: the architecture has none.
    """
    model_type: str = model.config.model_type  # type: ignore[union-attr,assignment]
    name = _OTHER_NORMS.get(model_type, _NORM)
    if name is None:
        raise BadInput(
            f"{model_type} has no norm before its FFN: there is no pre_norm input",
            hint="use predictor.input=post_norm: the FFN takes the residual stream as it is",
        )
    return model.get_submodule(f"{ffn.family.layers}.{ffn.layer}.{name}")


def input_module(model: nn.Module, ffn: FFN, source: Input) -> nn.Module:
    """The module whose first argument the predictor reads, [..., d_model]."""
    return ffn.gate if source == "post_norm" else norm_before(model, ffn)


@torch.no_grad()
def norm_scale(norm: nn.Module) -> Tensor:
    """What a norm multiplies each channel with, [d_model], up to one positive factor for all of them.

    Asked of the norm itself: some families store the factor minus one. A vector of ones has mean square one.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return norm(torch.ones_like(weight, dtype=torch.float32)[None])[0].float()


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
        return (torch.where(active, x1, torch.zeros((), dtype=x1.dtype, device=x1.device)),)


def logit(probability: float) -> float:
    """The score whose sigmoid is ``probability``; 0 at one half, infinite at 0 and 1."""
    if probability <= 0 or probability >= 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))
