"""Tiny random models for the tests of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_core.families import FAMILIES, family_of

MODEL_TYPES = [t for family in FAMILIES for t in family.model_types]
GATED = [t for family in FAMILIES if family.is_gated for t in family.model_types]
REMOTE_CODE = {"minicpm": Path(__file__).parent / "remote_minicpm"}
"""Architectures that transformers does not have: a folder with their code and a config that names it."""


def tiny(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of a few thousand weights; d_ff is divisible by nothing (where the architecture lets it)."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 53,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    family = family_of({"model_type": model_type})
    settings = settings if family is None else family.named(settings)
    if model_type == "falcon":  # there head_dim follows from the others and cannot be set
        del settings["head_dim"]
    if model_type == "gpt_neo":
        settings["attention_types"] = [[["global"], settings["num_hidden_layers"]]]
    if model_type == "gptj":
        settings["rotary_dim"] = 4
    torch.manual_seed(seed)
    if model_type in REMOTE_CODE:
        config = AutoConfig.from_pretrained(REMOTE_CODE[model_type], trust_remote_code=True, **settings)
    else:
        config = AutoConfig.for_model(model_type, **settings)
    trust = {"trust_remote_code": True} if model_type in REMOTE_CODE else {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trust).eval()


def tokens(batch: int = 2, length: int = 16, seed: int = 1, vocab: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
