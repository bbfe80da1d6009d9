"""The config of a model whose FFN runs FATReLU; it refuses to stand for any other activation."""

from __future__ import annotations

import math
from typing import Any

from transformers import LlamaConfig as BaseConfig

ACTIVATION_KEYS = ("hidden_act",)
"""Every key that names the FFN's activation in configs of this architecture."""


class ProSparseConfig(BaseConfig):
    """The base architecture's config with ``hidden_act: fatrelu``.

    Exactly one of the two is set; the other is absent or null:
        hidden_act_param: the threshold of every layer;
        hidden_act_params: one threshold per layer.

    FATReLU(x) is x where x >= threshold, else 0, compared in the dtype of x. Threshold 0 is ReLU.
    """

    model_type = f"prosparse_{BaseConfig.model_type}"

    hidden_act: str = ""
    hidden_act_param: float | None = None
    hidden_act_params: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.layer_thresholds()

    def layer_thresholds(self) -> list[float]:
        """The threshold of each layer.

        Raises:
            ValueError: the config does not say FATReLU with one sound threshold per layer.
        """
        for key in {"hidden_activation", *ACTIVATION_KEYS}:
            if getattr(self, key, "fatrelu") != "fatrelu":
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}: these weights were trained for FATReLU and are wrong under any "
                    f"other activation; config.json must say {key}: 'fatrelu'"
                )
        if (self.hidden_act_param is None) == (self.hidden_act_params is None):
            raise ValueError(
                "config.json must give FATReLU's threshold either as hidden_act_param (all layers) or as "
                f"hidden_act_params (one per layer), got {self.hidden_act_param} and {self.hidden_act_params}"
            )
        num_layers, per_layer = self.num_hidden_layers, self.hidden_act_params
        thresholds = [self.hidden_act_param] * num_layers if per_layer is None else list(per_layer)
        if len(thresholds) != num_layers:
            raise ValueError(f"{len(thresholds)} hidden_act_params for a model of {num_layers} layers")
        sound = [t for t in thresholds if isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t < math.inf]
        if len(sound) != num_layers:
            raise ValueError(f"FATReLU's thresholds must be finite numbers of at least 0, got {thresholds}")
        return [float(t) for t in sound]
