"""What an activation predictor reads: the FFN's own input, or the residual stream before the norm."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.family import FFN, Family, value_of

Input = Literal["pre_norm", "post_norm"]
"""What a predictor reads: the residual stream before the FFN's norm (what PowerInfer feeds), or the FFN's own input."""


def norm_before(model: nn.Module, ffn: FFN) -> nn.Module:
    """The norm whose output the FFN takes; its input is the residual stream.

    Raises:
        BadInput: the architecture has none.
    """
    require_norm(model.config, ffn.family)
    layer = model.get_submodule(f"{ffn.family.layers}.{ffn.layer}")
    for name in ffn.family.norm:
        with contextlib.suppress(AttributeError):
            return layer.get_submodule(name)
    raise BadInput(f"layer {ffn.layer} has none of the norms of family {ffn.family.name}: {', '.join(ffn.family.norm)}")


def require_norm(config: Any, family: Family) -> None:
    """Refuse predictors on the input before the norm where no norm comes before the FFN.

    Raises:
        BadInput: there is none.
    """
    if not family.norm or (family.norm_if and not value_of(config, family.norm_if)):
        raise BadInput(
            f"{value_of(config, 'model_type')} has no norm before its FFN: there is no pre_norm input",
            hint="use predictor.input=post_norm: the FFN takes the residual stream as it is",
        )


def input_module(model: nn.Module, ffn: FFN, source: Input) -> nn.Module:
    """The module whose first argument the predictor reads, [..., d_model]."""
    return ffn.first if source == "post_norm" else norm_before(model, ffn)


@torch.no_grad()
def norm_scale(norm: nn.Module, d_model: int, device: torch.device | str = "cpu") -> Tensor:
    """What a norm multiplies each channel with, [d_model], up to one positive factor for all of them.

    Asked of the norm itself: some families store the factor minus one, some none. The probe has mean zero, and the half
    difference to its negative has no bias in it, so that this is a LayerNorm's factor too; what a LayerNorm does
    besides (it subtracts the mean of x and adds a bias) is no factor and not in it.
    """
    probe = torch.ones(d_model, device=device)
    probe[1::2] = -1
    if d_model % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    return ((norm(probe[None]) - norm(-probe[None])) / 2 / probe)[0].float()
