"""Configs of models that run FATReLU, Shifted ReLU or dReLU, ours or released: the plain architecture they come to.

transformers lacks these activations (``base_model.OWN_ACTIVATIONS``). The weights are those of the plain architecture;
what the activation needs, thresholds or a shift, goes into the variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prosparse_core import minicpm
from prosparse_core.errors import BadInput
from prosparse_core.families import EXPORTED, require_family
from tasks.base_model import OWN_ACTIVATIONS, activation_name

RELEASED_TYPES = {"sparsellama": "llama"}
"""model_type of models others released with an activation of ours (ProSparse-LLaMA-2) -> the architecture they are."""
VLLM_FORM = "MiniCPMForCausalLM"
"""The class that vLLM runs FATReLU in, under which it keeps x > t; see :mod:`prosparse_core.formats.plain`."""
GRANITE = "granite"


@dataclass(frozen=True)
class Plain:
    """What a config with an activation of ours comes to."""

    config: dict[str, Any]
    """Of the plain architecture."""
    activation: str
    """fatrelu, shifted_relu or drelu."""
    thresholds: list[float] | None = None
    """FATReLU's, one per layer."""
    shift: float | None = None

    @property
    def setting(self) -> str:
        return "prosparse" if self.activation == "fatrelu" else self.activation


def plain_model(config: Mapping[str, Any], *, where: str, shift: float | None = None) -> Plain | None:
    """What a config with an activation of ours comes to; None: it has none of them. MiniCPM becomes the Granite it is.

    Args:
        shift: b of Shifted ReLU where the config has no hidden_act_param.

    Raises:
        BadInput: unknown architecture, an export or a released model with another activation, not exactly one sound
            threshold per layer, or no sound shift.
    """
    model_type = str(config.get("model_type"))
    known = RELEASED_TYPES.get(model_type) or model_type.removeprefix(EXPORTED)
    named = activation_name({**config, "model_type": known})
    activation = OWN_ACTIVATIONS.get(str(named), "fatrelu" if known != model_type else None)
    if activation is None:
        return None
    family = require_family({**config, "model_type": known}, where=where)
    dropped = ("hidden_act_param", "hidden_act_params", "auto_map", "architectures", "_name_or_path")
    plain = {k: v for k, v in config.items() if k not in dropped}
    plain |= {"model_type": known, **dict.fromkeys(family.activation_keys(config), "relu")}
    if known == minicpm.MODEL_TYPE:
        plain = {"model_type": GRANITE, **minicpm.granite_config(plain)}
    if activation == "fatrelu":
        return Plain(plain, activation, _thresholds(config, named, family.num_layers(config), where))
    plain[family.config_key] = f"prosparse_{activation}"  # so that a plain reload refuses it
    if activation == "drelu":
        return Plain(plain, activation)
    b = config.get("hidden_act_param", shift)
    if not _is_number(b):
        raise BadInput(
            f"{where}: config.json says {named}, and hidden_act_param is {b!r}: Shifted ReLU has a shift",
            hint="add hidden_act_param with the b that the model was trained with",
        )
    return Plain({**plain, "hidden_act_param": float(b)}, activation, shift=float(b))


def _thresholds(config: Mapping[str, Any], named: str | None, num_layers: int, where: str) -> list[float]:
    """FATReLU's threshold of every layer, for x >= t.

    Raises:
        BadInput: see :func:`plain_model`.
    """
    one, each = config.get("hidden_act_param"), config.get("hidden_act_params")
    found = one if each is None else each
    found = found if isinstance(found, list) else [found] * num_layers
    sound = len(found) == num_layers and all(_is_number(t) and t >= 0 for t in found)
    if named != "fatrelu" or not sound or (one is None) == (each is None):
        raise BadInput(
            f"{where}: config.json must say hidden_act: fatrelu with hidden_act_param (all layers) or "
            f"hidden_act_params (one per layer), it says {named!r}, {str(one)[:60]} and {str(each)[:60]}",
            hint="these weights are wrong under any other activation: export the model again",
        )
    if config.get("model_type") == minicpm.MODEL_TYPE or VLLM_FORM not in (config.get("architectures") or []):
        return [float(t) for t in found]
    import numpy as np

    # Our export for vLLM: the largest 32-bit float below t, since vLLM keeps x > t.
    return [float(np.nextafter(np.float32(t), np.float32(np.inf))) if t else 0.0 for t in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
