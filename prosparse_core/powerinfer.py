"""Files that PowerInfer's own binary loads: GGUF version 3 whose first four bytes say PWRI, with a predictor a layer.

PowerInfer (github.com/SJTU-IPADS/PowerInfer) computes a neuron when ``fc2 @ relu(fc1 @ r) >= sparse_threshold``, r the
residual stream before the FFN's norm, and then relu(gate) * up. So a file says neither a FATReLU threshold nor a cutoff
per layer; :func:`one_threshold` folds such cutoffs into ``fc2`` where that is exact. ``powerinfer_verify`` holds the
rules of the format, one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prosparse_core.errors import BadInput
from prosparse_core.formats.powerinfer_tokenizer import Vocabulary, read_vocabulary
from prosparse_core.prediction.mask import logit
from prosparse_core.predictor import LayerPredictor
from prosparse_core.store import require_space
from prosparse_core.variants import check_folder

MAGIC = b"PWRI"
ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral")
THRESHOLD_KEY = "powerinfer.sparse_threshold"
MAX_SLOW_NEURONS = 1000
"""Up to this many neurons a layer, PowerInfer runs another kernel, which ignores the threshold: -7 in blocks of 128."""
PADDED_NEURONS = 1024
HIDDEN_MULTIPLE = 32
"""The GPU kernels read rows in pieces of this many numbers: predictors get zero rows until their width is a multiple.
"""
ROW_MULTIPLE = {"f16": 8, "q4_0": 32}
"""d_model must be one of this: the kernels have no code for a rest."""
FILE_TYPES = {"f16": 1, "q4_0": 2}
Dtype = Literal["f16", "q4_0"]
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down_t": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Item:
    """One tensor to come: its numpy shape, and how to get it when its turn is there."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def quantises(self) -> bool:
        """Whether q4_0 is meant for it; what is looked up by row and the output layer stay f16."""
        return len(self.shape) == 2 and self.name.startswith("blk.")


def write_powerinfer(
    model_folder: Path,
    predictors: Sequence[LayerPredictor],
    target: Path,
    *,
    sparse_threshold: float,
    name: str,
    dtype: Dtype = "f16",
) -> Vocabulary:
    """Write a ReLU model with its predictors as one PowerInfer file; it appears whole or not at all.

    One tensor is in memory at a time. Layers of up to 1000 neurons get zero neurons up to 1024.

    Args:
        model_folder: Hugging Face folder (safetensors, fast tokenizer) of a ``llama`` or ``mistral`` model.
        predictors: one a layer, on the input before the norm.
        sparse_threshold: the score from which on a neuron is computed.

    Raises:
        BadInput: what the format cannot hold, said before anything is written; weights beyond the range of f16.
        EnvironmentProblem: the disk is too small.
    """
    import gguf

    config = check_folder(model_folder)
    refuse(config, dtype)
    if len(predictors) != config["num_hidden_layers"]:
        raise BadInput(f"{len(predictors)} predictors for a model of {config['num_hidden_layers']} layers")
    vocabulary = read_vocabulary(model_folder, int(config["vocab_size"]), config)
    items = list(_items(config, _Weights(model_folder), predictors))
    require_space(target.parent, sum(2 * int(np.prod(i.shape)) for i in items), f"the export to {target}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
    try:
        d_ff = padded_neurons(int(config["intermediate_size"]))
        add_model_keys(writer, config, vocabulary, name=name, dtype=dtype, d_ff=d_ff)
        writer.add_float32(THRESHOLD_KEY, sparse_threshold)
        kinds = [tensor_kind(item, dtype) for item in items]
        for item, kind in zip(items, kinds, strict=True):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = int(np.prod(item.shape)) // block * size
            writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), num_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item, kind in zip(items, kinds, strict=True):
            writer.write_tensor_data(encode(item, kind))
        writer.close()
        with open(temporary, "r+b") as handle:
            handle.write(MAGIC)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return vocabulary


def refuse(config: Mapping[str, Any], dtype: Dtype = "f16", format_: str = "PowerInfer's format") -> None:
    """Say why a model does not fit the format.

    Raises:
        BadInput: an architecture of another layout; else with every reason at once.
    """
    if config["model_type"] not in MODEL_TYPES:
        raise BadInput(
            f"PowerInfer's format has no place for architecture {config['model_type']}; it runs "
            f"{' and '.join(MODEL_TYPES)} layers",
            hint="use prosparse export --to hf instead",
        )
    heads, d_model = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    window = config.get("sliding_window")
    reasons = {
        "projections with a bias": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"rope scaling {scaling!r}": scaling != "default",
        f"a sliding window of {window} tokens": window is not None and window < config["max_position_embeddings"],
        f"heads of {config.get('head_dim')} numbers where d_model / heads is {d_model / heads:g}": d_model % heads != 0
        or (config.get("head_dim") or d_model // heads) * heads != d_model,
        f"{heads} heads over {kv_heads} key-value heads": heads % kv_heads != 0,
        f"d_model {d_model}, no multiple of {ROW_MULTIPLE[dtype]} ({dtype})": d_model % ROW_MULTIPLE[dtype] != 0,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise BadInput(f"{format_} has no place for " + "; ".join(found), hint="use prosparse export --to hf instead")


def one_threshold(cutoffs: Sequence[float]) -> tuple[float, list[float]]:
    """(sparse_threshold, a positive factor for each layer's fc2) that say the same as one cutoff a layer.

    A score s reaches logit c exactly where k * s reaches k * c: with factors k all layers share one threshold, as long
    as all cutoffs lie on the same side of one half.

    Raises:
        BadInput: they do not.
    """
    logits = [logit(c) for c in cutoffs]
    if len(set(logits)) == 1:
        return logits[0], [1.0] * len(logits)
    if not (all(x > 0 for x in logits) or all(x < 0 for x in logits)):
        raise BadInput(
            f"cutoffs from {min(cutoffs):g} to {max(cutoffs):g}: the file has one threshold for all layers, and no "
            "factor of a layer's scores moves a cutoff across one half",
            hint="choose one cutoff for all layers: --cutoff 0.5, or predictor.cutoff_scope=global",
        )
    threshold = sum(logits) / len(logits)
    return threshold, [threshold / x for x in logits]


def scaled(predictor: LayerPredictor, *, channels: Tensor | None = None, factor: float = 1.0) -> LayerPredictor:
    """A predictor whose ``fc1`` columns are multiplied by ``channels`` [d_model] and ``fc2`` by ``factor``."""
    d_model, hidden, d_ff = predictor.fc1.in_features, predictor.hidden, predictor.fc2.out_features
    result = LayerPredictor(d_model, d_ff, hidden)
    with torch.no_grad():
        result.fc1.weight.copy_(predictor.fc1.weight * (1.0 if channels is None else channels))
        result.fc2.weight.copy_(predictor.fc2.weight * factor)
    return result.eval()


class _Weights:
    """The tensors of a safetensors folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadInput(f"{folder} has no safetensors weights", hint="save the model with save_pretrained first")
        self._folder = folder
        self._open = {path: safe_open(path, "pt") for path in files}
        self._where = {name: handle for handle in self._open.values() for name in handle.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        if name not in self._where:
            raise BadInput(f"{self._folder} has no tensor {name}")
        return self._where[name].get_tensor(name).float()


def dense_items(config: Mapping[str, Any], model_folder: Path) -> Iterator[Item]:
    """Every tensor of an ordinary GGUF file of the model: no predictors, down as it is."""
    return _items(config, _Weights(model_folder), None)


def _items(config: Mapping[str, Any], weights: _Weights, predictors: Sequence[LayerPredictor] | None) -> Iterator[Item]:
    """Every tensor of the file, in its order."""
    d_model, heads, rows = int(config["hidden_size"]), int(config["num_attention_heads"]), int(config["vocab_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    kv_rows, d_ff = d_model // heads * kv_heads, int(config["intermediate_size"])
    if predictors is not None:
        d_ff = padded_neurons(d_ff)
    embedding = "model.embed_tokens.weight"
    output = embedding if config.get("tie_word_embeddings") or "lm_head.weight" not in weights else "lm_head.weight"

    def item(name: str, source: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor] | None = None) -> Item:
        return Item(f"{name}.weight", shape, lambda: change(weights.get(source)) if change else weights.get(source))

    yield item("token_embd", embedding, (rows, d_model))
    yield item("output", output, (rows, d_model))
    yield item("output_norm", "model.norm.weight", (d_model,))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "attn_q": lambda w: interleave(w, heads),
        "attn_k": lambda w: interleave(w, kv_heads),
        "ffn_gate": lambda w: pad_rows(w, d_ff),
        "ffn_up": lambda w: pad_rows(w, d_ff),
        "ffn_down_t": lambda w: pad_rows(w.T, d_ff),
    }
    shapes = {"attn_k": (kv_rows, d_model), "attn_v": (kv_rows, d_model), "ffn_down": (d_model, d_ff)}
    for layer in range(int(config["num_hidden_layers"])):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        for name, norm in NORMS.items():
            yield item(f"{block}.{name}", f"{source}.{norm}.weight", (d_model,))
        for name, matrix in MATRICES.items():
            name = name.removesuffix("_t") if predictors is None else name
            shape = shapes.get(name, (d_ff if name.startswith("ffn") else d_model, d_model))
            yield item(f"{block}.{name}", f"{source}.{matrix}.weight", shape, changes.get(name))
        if predictors is None:
            continue
        predictor = predictors[layer]
        hidden = -(-predictor.hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        fc1, fc2 = predictor.fc1.weight.detach(), predictor.fc2.weight.detach()
        yield Item(f"{block}.fc1.weight", (hidden, d_model), lambda w=fc1, n=hidden: pad_rows(w, n))  # type: ignore[misc]
        yield Item(
            f"{block}.fc2.weight",
            (d_ff, hidden),
            lambda w=fc2, n=hidden: pad_rows(pad_rows(w.T, n).T, d_ff),  # type: ignore[misc]
        )


def padded_neurons(d_ff: int) -> int:
    """How many neurons a layer has in the file."""
    return d_ff if d_ff > MAX_SLOW_NEURONS else PADDED_NEURONS


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """[n, m] with zero rows below, to [rows, m]."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - len(matrix)))


def interleave(matrix: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from Hugging Face's order of a head (first halves of the rotated pairs, then
    second halves) to GGML's (pair by pair)."""
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(matrix.shape)


def tensor_kind(item: Item, dtype: Dtype) -> Any:
    from gguf import GGMLQuantizationType

    if len(item.shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q4_0 if dtype == "q4_0" and item.quantises else GGMLQuantizationType.F16


def encode(item: Item, kind: Any) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    tensor = item.load()
    if tuple(tensor.shape) != item.shape:
        raise BadInput(f"{item.name} would be {list(tensor.shape)}, the config says {list(item.shape)}")
    values = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
    if kind == GGMLQuantizationType.F32:
        return values
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise BadInput(f"{item.name} holds {largest:g}: beyond the range of f16, the format's only other type is q4_0")
    return values.astype(np.float16) if kind == GGMLQuantizationType.F16 else quants.quantize(values, kind)


def add_model_keys(
    writer: Any, config: Mapping[str, Any], vocabulary: Vocabulary, *, name: str, dtype: Dtype, d_ff: int
) -> None:
    """What GGUF says of any model of this architecture, PowerInfer's or not."""
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(d_ff)
    writer.add_rope_dimension_count(int(config["hidden_size"]) // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.eos is not None:
        writer.add_eos_token_id(vocabulary.eos)
