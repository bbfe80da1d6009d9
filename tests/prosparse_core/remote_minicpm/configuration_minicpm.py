"""A config that comes with its checkpoint, in the old style: values are set in ``__init__``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 96,
        hidden_size: int = 32,
        intermediate_size: int = 53,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        hidden_act: str = "silu",
        max_position_embeddings: int = 128,
        initializer_range: float = 0.1,
        rms_norm_eps: float = 1e-5,
        scale_emb: float = 12.0,
        scale_depth: float = 1.4,
        dim_model_base: int = 8,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base
        self.attention_bias = False
        self.attention_dropout = 0.0
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
