"""What an activation predictor reads: the FFN's own input, or the residual stream before the norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.families import FFN

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
