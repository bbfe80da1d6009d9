"""From a transformers model to the native decoder: the same function of the same weights, or a reasoned refusal."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, EnvironmentProblem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kernels.decoder import DecoderModel, DecoderWeights
    from prosparse_core.prediction.input import Input
    from prosparse_core.predictor import LayerPredictor

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers the native decoder computes; the others of the FFN families have more norms or factors."""
SILU = ("SiLU", "SiLUActivation")
"""The class of SiLU in torch, and in transformers."""
ROPE_PROBE = 8
"""Positions that are rotated twice, to see whether the length of a sequence changes their angles."""


def native_model(
    model: nn.Module,
    *,
    capacity: int,
    dtype: torch.dtype,
    predictors: Sequence[LayerPredictor] = (),
    source: Input = "post_norm",
) -> DecoderModel:
    """The weights of a model packed for native decoders of up to ``capacity`` positions, matrices in ``dtype``.

    Args:
        predictors: one a layer, which read ``source``.

    Raises:
        BadInput: an architecture, activation or rotation that the native decoder does not compute, a capacity beyond
            the model's positions, weights that are not finite or leave the range of ``dtype``.
        EnvironmentProblem: this machine cannot have the native kernels.
    """
    from kernels.decoder import DecoderModel

    weights = decoder_weights(model, capacity, predictors, source)
    try:
        return DecoderModel(weights, dtype)
    except ValueError as error:
        raise BadInput(f"the native decoder cannot take this model: {error}") from error
    except RuntimeError as error:
        raise EnvironmentProblem(str(error)) from error


def decoder_weights(
    model: nn.Module, capacity: int, predictors: Sequence[LayerPredictor] = (), source: Input = "post_norm"
) -> DecoderWeights:
    """The plain weights behind :func:`native_model`, not copied."""
    from kernels.decoder import DecoderWeights, LayerWeights
    from prosparse_core.families import find_ffns

    whole: Any = model
    config = whole.config
    _check(config, capacity)
    activation, thresholds = _activation(model)
    cos, sin = rotations(whole.model.rotary_emb, capacity)
    layers = []
    for ffn, layer in zip(find_ffns(model), whole.model.layers, strict=True):
        attention = layer.self_attn
        layers.append(
            LayerWeights(
                attention_norm=layer.input_layernorm.weight,
                query=attention.q_proj.weight,
                key=attention.k_proj.weight,
                value=attention.v_proj.weight,
                out=attention.o_proj.weight,
                ffn_norm=layer.post_attention_layernorm.weight,
                gate=ffn.act_weight,
                up=ffn.up_weight,
                down=ffn.down_weight,
                query_bias=attention.q_proj.bias,
                key_bias=attention.k_proj.bias,
                value_bias=attention.v_proj.bias,
                out_bias=attention.o_proj.bias,
                query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
                key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
                threshold=thresholds[ffn.layer],
                window=_window(config, attention),
            )
        )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    return DecoderWeights(
        layers=layers,
        embedding=embedding,
        final_norm=whole.model.norm.weight,
        cos=cos,
        sin=sin,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        eps=float(config.rms_norm_eps),
        lm_head=None if head is embedding else head,
        scale=float(whole.model.layers[0].self_attn.scaling),
        activation=activation,
        predictors=[(p.fc1.weight, p.fc2.weight) for p in predictors],
        pre_norm=source == "pre_norm",
    )


def supports(model_type: str) -> bool:
    """Whether the native decoder computes this architecture."""
    return model_type in MODEL_TYPES


def _check(config: Any, capacity: int) -> None:
    if not supports(config.model_type):
        raise BadInput(
            f"the native decoder does not compute architecture {config.model_type!r}",
            hint=f"it knows {', '.join(MODEL_TYPES)}; transformers decodes the others",
        )
    if not 1 <= capacity <= config.max_position_embeddings:
        raise BadInput(
            f"a cache of {capacity} positions for a model of {config.max_position_embeddings}",
            hint="ask for fewer tokens",
        )


def _activation(model: nn.Module) -> tuple[str, list[float]]:
    """(relu or silu, threshold per layer)."""
    from prosparse_core.decode import ffn_thresholds
    from prosparse_core.families import find_ffns

    ffns = find_ffns(model)
    if runs_silu(model):
        biased = [f.layer for f in ffns if f.biases]
        if biased:
            raise BadInput(f"layer {biased[0]}: an FFN with a bias: the native decoder knows none")
        return "silu", [0.0] * len(ffns)
    return "relu", ffn_thresholds(model)


def runs_silu(model: nn.Module) -> bool:
    """Whether every FFN has SiLU: no exact zeros."""
    from prosparse_core.families import find_ffns

    return all(type(f.activation).__name__ in SILU for f in find_ffns(model))


def _window(config: Any, attention: Any) -> int | None:
    """How many positions a token sees; mistral says it once for all layers, qwen at each."""
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":
        window = config.sliding_window
    return None if window is None else int(window)


def rotations(rotary: nn.Module, capacity: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[capacity, head_dim]`` of a model's own rotary module, whatever its scaling.

    Raises:
        BadInput: the angles of early positions change with the length of the sequence (``dynamic``, ``longrope`` beyond
            the trained length): keys that are cached already would have to turn again.
    """
    import torch

    module: Any = copy.deepcopy(rotary).float().cpu()
    like = torch.zeros(1, dtype=torch.float32)
    with torch.no_grad():
        first, _ = module(like, torch.arange(min(ROPE_PROBE, capacity))[None])
        cos, sin = module(like, torch.arange(capacity)[None])
    if not torch.equal(first[0], cos[0, : first.shape[1]]):
        raise BadInput(
            f"rope scaling {getattr(module, 'rope_type', '?')!r} turns early positions differently in sequences of "
            f"{capacity} tokens: the native decoder keeps what it has turned",
            hint="ask for no more tokens than the model was trained on",
        )
    return cos[0], sin[0]
