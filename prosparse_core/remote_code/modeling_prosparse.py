"""The base architecture with FATReLU in every FFN: exact zeros where gate(x) stays below the layer's threshold."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel

from .configuration_prosparse import ACTIVATION_KEYS, ProSparseConfig

LAYERS = "model.layers"
"""Path from the language model to its layers."""
ACTIVATION = "mlp.act_fn"
"""Path from a layer to the activation of its FFN."""


class FATReLU(nn.Module):
    """x where x >= threshold, else 0; threshold 0 is ReLU (arXiv 2402.13516, eq. 3)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == 0:
            return torch.relu(x)
        return nn.functional.threshold(x, below(self.threshold, x.dtype), 0.0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


@functools.cache
def below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a precision that is less than the threshold in that precision: torch's own is strict."""
    return float(torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))


def rename_as_the_base_does() -> None:
    """transformers (from 5 on) gives the weights of some architectures other names in files than in the model, by the
    class or the ``model_type``. Ours are the same weights under another ``model_type``."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping as found
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping as register
    except ImportError:
        return
    renaming = found(BaseForCausalLM.__name__) or found(ProSparseConfig.model_type.removeprefix("prosparse_"))
    if renaming:
        register(ProSparseConfig.model_type, renaming, overwrite=True)


class UsesFATReLU(nn.Module):
    """Builds the base model around a stand-in activation, then gives each layer its own FATReLU."""

    def __init__(self, config: ProSparseConfig, *args: Any, **kwargs: Any) -> None:
        thresholds = config.layer_thresholds()
        # The base class looks its activation up by name while it is built, and knows no fatrelu.
        keys = [k for k in ("hidden_activation", *ACTIVATION_KEYS) if hasattr(config, k)]
        try:
            for key in keys:
                setattr(config, key, "relu")
            super().__init__(config, *args, **kwargs)
        finally:
            for key in keys:
                setattr(config, key, "fatrelu")
        decoder: Any = self.base_model
        layers = decoder.get_submodule(LAYERS.removeprefix(f"{decoder.base_model_prefix}."))
        path, _, name = ACTIVATION.rpartition(".")
        for layer, threshold in zip(layers, thresholds, strict=True):
            setattr(layer.get_submodule(path), name, FATReLU(threshold))


class ProSparseModel(UsesFATReLU, BaseModel):
    """The decoder without a head."""

    config_class = ProSparseConfig


class ProSparseForCausalLM(UsesFATReLU, BaseForCausalLM):
    """The language model."""

    config_class = ProSparseConfig


rename_as_the_base_does()
