"""Activation substitution on an instance: swap, count, refuse a partial swap (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from prosparse_core.activations import FATReLU, ReLU
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns


def substitute(model: nn.Module, make: Callable[[int], nn.Module]) -> int:
    """Give every FFN of ``model`` the activation ``make(layer)``; the class and other instances stay as they are.

    Returns:
        The number of swapped activations: the number of layers.
    """
    ffns = find_ffns(model)
    for ffn in ffns:
        ffn.swap_activation(make(ffn.layer))
    swapped = sum(isinstance(f.activation, type(make(f.layer))) for f in ffns)
    assert swapped == len(ffns) == model.config.num_hidden_layers, f"{swapped} of {len(ffns)} activations swapped"  # type: ignore[union-attr]
    return swapped


def use_relu(model: nn.Module) -> int:
    """Substitute ReLU and say so in the config, so that a plain reload of the saved model runs ReLU too."""
    swapped = substitute(model, lambda layer: ReLU())
    family = find_ffns(model)[0].family
    setattr(model.config, family.config_key, "relu")
    return swapped


def use_thresholds(model: nn.Module, thresholds: Sequence[float]) -> int:
    """FATReLU with one threshold per layer; a single value serves all layers.

    Raises:
        BadInput: the number of thresholds is neither 1 nor the number of layers.
    """
    num_layers = len(find_ffns(model))
    if len(thresholds) not in (1, num_layers):
        raise BadInput(f"{len(thresholds)} thresholds for a model of {num_layers} layers")
    per_layer = list(thresholds) * (num_layers if len(thresholds) == 1 else 1)
    return substitute(model, lambda layer: FATReLU(per_layer[layer]))
