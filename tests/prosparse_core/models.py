"""Tiny random models for the tests of the method."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def tiny(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of a few thousand weights; d_ff is divisible by nothing."""
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
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(batch: int = 2, length: int = 16, seed: int = 1, vocab: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
