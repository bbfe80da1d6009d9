"""MiniCPM checkpoints without the code that comes with them: the same weights are a Granite, which transformers has.

MiniCPM is LLaMA with three factors (see ``formats.plain``), Granite is LLaMA with four. Embeddings times ``scale_emb``:
``embedding_multiplier``. Blocks times ``scale_depth / sqrt(layers)``: ``residual_multiplier``. The last hidden state
over ``hidden / dim_model_base``: the logits over ``logits_scaling``. LLaMA's own 1 / sqrt(head size):
``attention_multiplier``. The weights have the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prosparse_core.errors import BadInput

MODEL_TYPE = "minicpm"
FACTORS = ("scale_emb", "scale_depth", "dim_model_base")
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
)


def granite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the Granite that a MiniCPM is.

    Raises:
        BadInput: it has what Granite has not (experts, scaled positions), or not the factors that make it a MiniCPM.
    """
    missing = [key for key in FACTORS if config.get(key) is None]
    ropes = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    scaling = next((s for s in (r.get("rope_type", r.get("type")) for r in ropes) if s not in (None, "default")), None)
    reasons = {
        f"no {', '.join(missing)}": bool(missing),
        f"rope scaling {scaling!r}": scaling is not None,
        f"{config.get('num_experts')} experts": bool(config.get("num_experts")),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise BadInput(
            f"this {MODEL_TYPE} cannot be read without the code that comes with it: it has {'; '.join(found)}",
            hint="read that code, then say model.trust_remote_code: true",
        )
    num_layers, d_model = int(config["num_hidden_layers"]), int(config["hidden_size"])
    return {
        **{key: config[key] for key in KEPT if config.get(key) is not None},
        # MiniCPM's code ties them where the config does not say otherwise.
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ropes[0].get("rope_theta") or config.get("rope_theta") or 10000.0,
        },
        "embedding_multiplier": config["scale_emb"],
        "residual_multiplier": config["scale_depth"] / math.sqrt(num_layers),
        "logits_scaling": d_model / config["dim_model_base"],
        "attention_multiplier": (d_model // int(config["num_attention_heads"])) ** -0.5,
    }
