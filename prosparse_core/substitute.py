"""Activation substitution on an instance: swap, count, refuse a partial swap (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prosparse_core.activations import FATReLU, ReLU, ShiftedReLU
from prosparse_core.errors import BadInput
from prosparse_core.families import FFN, Family, find_ffns

UNKNOWN_TO_TRANSFORMERS = "prosparse_"
"""Before the name of an activation in a saved config: only the pipeline, which puts it in again, can load that."""


def substitute(model: nn.Module, make: Callable[[int], nn.Module]) -> int:
    """Give every FFN of ``model`` the activation ``make(layer)``; the class and other instances stay as they are.

    Returns:
        The number of swapped activations: the number of layers.
    """
    ffns = find_ffns(model)
    for ffn in ffns:
        ffn.swap_activation(make(ffn.layer))
    swapped = sum(isinstance(f.activation, type(make(f.layer))) for f in ffns)
    assert swapped == len(ffns) == ffns[0].family.num_layers(model.config), (
        f"{swapped} of {len(ffns)} activations swapped"
    )
    return swapped


def use_relu(model: nn.Module) -> int:
    """Substitute ReLU and say so in the config, so that a plain reload of the saved model runs ReLU too.

    Where the architecture's code has its activation built in (``Family.act_is_built_in``) no config can say so: such a
    model is loaded by ``load_variant``, or exported with code of its own.
    """
    swapped = substitute(model, lambda layer: ReLU())
    family = find_ffns(model)[0].family
    setattr(model.config, family.config_key, "relu")
    return swapped


def use_activation(model: nn.Module, activation: str, shift: float | None = None) -> int:
    """Substitute by name: original (nothing is swapped), relu, shifted_relu (needs ``shift``) or drelu.

    dReLU puts ReLU on gate and up (arXiv 2406.05955); an FFN without a gate has none. A saved shifted_relu or drelu
    model is refused by a plain reload: its config names an activation that transformers does not have.

    Returns:
        The number of swapped activations.
    """
    if activation == "original":
        return 0
    if activation == "relu":
        return use_relu(model)
    if activation == "shifted_relu":
        assert shift is not None, "shifted_relu has a shift"
        swapped = substitute(model, lambda layer: ShiftedReLU(shift))
    elif activation == "drelu":
        swapped = substitute(model, lambda layer: ReLU())
        for ffn in find_ffns(model):
            _put_relu_on_up(ffn)
    else:
        raise BadInput(f"unknown activation {activation!r}", hint="original, relu, shifted_relu or drelu")
    setattr(model.config, find_ffns(model)[0].family.config_key, UNKNOWN_TO_TRANSFORMERS + activation)
    return swapped


def require_up(family: Family, what: str) -> None:
    """Refuse dReLU where there is only one projection to put a ReLU on.

    Raises:
        BadInput: the family has no gate.
    """
    if not family.is_gated:
        raise BadInput(
            f"{what}: an FFN of family {family.name} has no gate, so that dReLU would be plain ReLU",
            hint="use relu",
        )


def _put_relu_on_up(ffn: FFN) -> None:
    require_up(ffn.family, "drelu")
    d_ff = ffn.d_ff

    def relu_of_up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if ffn.family.gate_up is None:
            return torch.relu(output)
        return torch.cat([output[..., :d_ff], torch.relu(output[..., d_ff:])], dim=-1)

    name = ffn.family.gate_up or ffn.family.up
    assert name is not None
    ffn.module.get_submodule(name).register_forward_hook(relu_of_up)


def use_thresholds(model: nn.Module, thresholds: Sequence[float]) -> int:
    """FATReLU with one threshold per layer; a single value serves all layers.

    Raises:
        BadInput: the number of thresholds is neither 1 nor the number of layers, or one is not a finite number >= 0.
    """
    num_layers = len(find_ffns(model))
    if len(thresholds) not in (1, num_layers):
        raise BadInput(
            f"{len(thresholds)} thresholds for a model of {num_layers} layers",
            hint="give 1, or one per layer: thresholds of another model do not fit",
        )
    wrong = [t for t in thresholds if not 0 <= t < float("inf")]
    if wrong:
        raise BadInput(f"thresholds {wrong}: FATReLU needs finite thresholds of at least 0")
    per_layer = list(thresholds) * (num_layers if len(thresholds) == 1 else 1)
    return substitute(model, lambda layer: FATReLU(per_layer[layer]))
