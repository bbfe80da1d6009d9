"""The base architecture with FATReLU in every FFN: exact zeros where gate(x) stays below the layer's threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel

from .configuration_prosparse import ProSparseConfig


class FATReLU(nn.Module):
    """x where x >= threshold, else 0; threshold 0 is ReLU (arXiv 2402.13516, eq. 3)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == 0:
            return torch.relu(x)
        return torch.where(x >= self.threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class UsesFATReLU(nn.Module):
    """Builds the base model around a stand-in activation, then gives each layer its own FATReLU."""

    def __init__(self, config: ProSparseConfig, *args: Any, **kwargs: Any) -> None:
        thresholds = config.layer_thresholds()
        # The base class looks its activation up by name while it is built, and knows no fatrelu.
        keys = [k for k in ("hidden_act", "hidden_activation") if hasattr(config, k)]
        try:
            for key in keys:
                setattr(config, key, "relu")
            super().__init__(config, *args, **kwargs)
        finally:
            for key in keys:
                setattr(config, key, "fatrelu")
        decoder: Any = self.base_model
        for layer, threshold in zip(decoder.layers, thresholds, strict=True):
            layer.mlp.act_fn = FATReLU(threshold)


class ProSparseModel(UsesFATReLU, BaseModel):
    """The decoder without a head."""

    config_class = ProSparseConfig


class ProSparseForCausalLM(UsesFATReLU, BaseForCausalLM):
    """The language model."""

    config_class = ProSparseConfig
