"""The contract of a PowerInfer file, rule by rule; what breaks one loads wrongly there, or not at all.

Several of these are silent in the engine itself: FFN weights of another type give NaN, up to 1000 neurons run a kernel
with a threshold of its own, and a file that says GGUF runs SiLU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prosparse_core.errors import ProSparseError
from prosparse_core.formats.powerinfer_file import (
    ALIGNMENT,
    ARRAY,
    F32,
    GGML_F16,
    GGML_F32,
    GGML_Q4_0,
    GGUF,
    I32,
    STRING,
    U32,
    Value,
    read_gguf,
)
from prosparse_core.powerinfer import ARCHITECTURE, FILE_TYPES, MAGIC, MAX_SLOW_NEURONS, ROW_MULTIPLE, THRESHOLD_KEY

SIZES = {
    "llama.context_length": "context",
    "llama.embedding_length": "d_model",
    "llama.block_count": "num_layers",
    "llama.feed_forward_length": "d_ff",
    "llama.attention.head_count": "heads",
    "llama.attention.head_count_kv": "kv_heads",
    "llama.rope.dimension_count": "rotated",
}
FLOATS = ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
TOKENS, SCORES, TYPES, MERGES = (f"tokenizer.ggml.{n}" for n in ("tokens", "scores", "token_type", "merges"))
KINDS = {GGML_F32: "f32", GGML_F16: "f16", GGML_Q4_0: "q4_0", 8: "q8_0"}


def verify(path: Path) -> list[str]:
    """Every rule the file breaks, in words; empty for a file that PowerInfer runs as it is meant.

    Raises:
        BadInput: it has not even the structure of a GGUF file.
    """
    file = read_gguf(path)
    broken = [*_header(file), *_keys(file)]
    sizes = {short: file.keys[key].data for key, short in SIZES.items() if key in file.keys}
    if broken or len(sizes) < len(SIZES):
        return broken
    broken += [*_shapes_of_the_engine(file, sizes), *_tokens(file)]
    broken += _tensors(file, sizes)
    return broken or list(_values(file))


def require_valid(path: Path) -> None:
    """Refuse a file that breaks a rule.

    Raises:
        ProSparseError: with every broken rule.
    """
    broken = verify(path)
    if broken:
        raise ProSparseError(f"{path} would not run in PowerInfer:\n" + "\n".join(f"  - {b}" for b in broken))


def _header(file: GGUF) -> Iterator[str]:
    if file.magic != MAGIC:
        yield f"the first bytes are {file.magic!r}, not {MAGIC!r}: PowerInfer would run it dense, with SiLU"
    if file.version != 3:
        yield f"GGUF version {file.version}, not 3"
    alignment = file.keys.get("general.alignment")
    if alignment is not None and alignment.data != ALIGNMENT:
        yield f"alignment {alignment.data}, not {ALIGNMENT}"


def _keys(file: GGUF) -> Iterator[str]:
    architecture = file.keys.get("general.architecture")
    if architecture is None or architecture.data != ARCHITECTURE:
        yield f"general.architecture is {_show(architecture)}, not {ARCHITECTURE!r}"
    for key in SIZES:
        found = file.keys.get(key)
        if found is None or found.kind != U32 or found.data <= 0:
            yield f"{key} is {_show(found)}, not a positive 32-bit integer"
    for key in FLOATS:
        found = file.keys.get(key)
        if found is None or found.kind != F32 or not (math.isfinite(found.data) and found.data > 0):
            yield f"{key} is {_show(found)}, not a positive 32-bit float"
    threshold = file.keys.get(THRESHOLD_KEY)
    if threshold is not None and (threshold.kind != F32 or math.isnan(threshold.data)):
        yield f"{THRESHOLD_KEY} is {_show(threshold)}, not a 32-bit float"
    file_type = file.keys.get("general.file_type")
    if file_type is None or file_type.kind != U32 or file_type.data not in FILE_TYPES.values():
        yield f"general.file_type is {_show(file_type)}, not 1 (f16) or 2 (q4_0)"
    for key in sorted(k for k in file.keys if k.startswith("llama.rope.scal")):
        yield f"{key}: rope scaling is no part of this export"


def _shapes_of_the_engine(file: GGUF, sizes: dict[str, int]) -> Iterator[str]:
    d_model, heads, kv_heads = sizes["d_model"], sizes["heads"], sizes["kv_heads"]
    dtype = next(name for name, number in FILE_TYPES.items() if number == file.keys["general.file_type"].data)
    if d_model % heads or heads % kv_heads:
        yield f"d_model {d_model}, {heads} heads, {kv_heads} key-value heads do not divide"
    if sizes["rotated"] * heads != d_model:
        yield f"rope.dimension_count is {sizes['rotated']}, not d_model / heads = {d_model / heads:g}: refused there"
    if d_model % ROW_MULTIPLE[dtype]:
        yield f"d_model {d_model} is no multiple of {ROW_MULTIPLE[dtype]}: the {dtype} kernels have no code for a rest"
    if sizes["d_ff"] <= MAX_SLOW_NEURONS:
        yield (
            f"{sizes['d_ff']} neurons a layer: up to {MAX_SLOW_NEURONS} PowerInfer runs another kernel, with a "
            "threshold of its own; zero neurons are to fill it up"
        )


def _tokens(file: GGUF) -> Iterator[str]:
    kind = file.keys.get("tokenizer.ggml.model")
    if kind is None or kind.kind != STRING or kind.data not in ("gpt2", "llama"):
        yield f"tokenizer.ggml.model is {_show(kind)}, not 'gpt2' or 'llama'"
        return
    needed = {TOKENS: STRING, SCORES: F32, TYPES: I32} | ({MERGES: STRING} if kind.data == "gpt2" else {})
    lists = {}
    for key, entries in needed.items():
        found = file.keys.get(key)
        if found is None or found.kind != ARRAY or found.entries != entries:
            yield f"{key} is {'missing' if found is None else 'of another type'}"
        else:
            lists[key] = found.data
    if TOKENS not in lists:
        return
    count = len(lists[TOKENS])
    yield from (
        f"{key} has {len(lists[key])} entries for {count} tokens"
        for key in (SCORES, TYPES)
        if key in lists and len(lists[key]) != count
    )
    if "" in lists[TOKENS]:
        yield f"token {lists[TOKENS].index('')} is empty"
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != count:
        yield f"{count} tokens, but token_embd has {embedding.shape[0]} rows: vocab size mismatch there"
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        found = file.keys.get(key)
        if found is not None and (found.kind != U32 or found.data >= count):
            yield f"{key} is {_show(found)}, not one of {count} tokens"


def expected_shapes(file: GGUF, sizes: dict[str, int]) -> dict[str, tuple[int | None, ...]]:
    """The shape of every tensor there must be; None is the free width of a layer's predictor."""
    d_model, d_ff = sizes["d_model"], sizes["d_ff"]
    tokens, kv_rows = file.keys.get(TOKENS, Value(ARRAY, [])), d_model // sizes["heads"] * sizes["kv_heads"]
    rows = len(tokens.data)
    expected: dict[str, tuple[int | None, ...]] = {
        "token_embd.weight": (rows, d_model),
        "output.weight": (rows, d_model),
        "output_norm.weight": (d_model,),
    }
    block: dict[str, tuple[int | None, ...]] = {
        "attn_norm": (d_model,),
        "ffn_norm": (d_model,),
        "attn_q": (d_model, d_model),
        "attn_k": (kv_rows, d_model),
        "attn_v": (kv_rows, d_model),
        "attn_output": (d_model, d_model),
        "ffn_gate": (d_ff, d_model),
        "ffn_up": (d_ff, d_model),
        "ffn_down_t": (d_ff, d_model),
        "fc1": (None, d_model),
        "fc2": (d_ff, None),
    }
    for layer in range(sizes["num_layers"]):
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return expected


def _tensors(file: GGUF, sizes: dict[str, int]) -> list[str]:
    expected = expected_shapes(file, sizes)
    quantised = file.keys["general.file_type"].data == FILE_TYPES["q4_0"]
    broken = [f"{name} is missing" for name in expected if name not in file.tensors]
    broken += [f"{name} is no tensor of this format" for name in file.tensors if name not in expected]
    known = [info for name, info in file.tensors.items() if name in expected]
    for info in known:
        wanted = expected[info.name]
        if len(info.shape) != len(wanted) or any(w not in (None, s) for s, w in zip(info.shape, wanted, strict=True)):
            broken.append(f"{info.name} is {list(info.shape)}, not {[w or 'any' for w in wanted]}")
        kinds = (GGML_F32,) if len(wanted) == 1 else (GGML_F16, GGML_Q4_0) if quantised else (GGML_F16,)
        if info.kind not in kinds:
            names, found = " or ".join(KINDS[k] for k in kinds), KINDS.get(info.kind, f"GGML type {info.kind}")
            broken.append(f"{info.name} is {found}, not {names}" + (": NaN there" if ".ffn_" in info.name else ""))
        if info.kind == GGML_Q4_0 and info.shape[-1] % 32:
            broken.append(f"{info.name}: rows of {info.shape[-1]} numbers, no multiple of 32, as q4_0")
        if info.offset % ALIGNMENT:
            broken.append(f"{info.name} begins at {info.offset}, no multiple of {ALIGNMENT}")
        if info.num_bytes is None or file.data_start + info.offset + info.num_bytes > file.num_bytes:
            broken.append(f"{info.name} reaches beyond the end of the file")
    for layer in range(sizes["num_layers"]):
        pair = [file.tensors.get(f"blk.{layer}.{name}.weight") for name in ("fc1", "fc2")]
        first, second = pair
        if first and second and first.shape[0] != second.shape[-1]:
            broken.append(f"layer {layer}: fc1 gives {first.shape[0]} numbers, fc2 takes {second.shape[-1]}")
    by_offset = sorted((i for i in known if i.num_bytes is not None), key=lambda i: i.offset)
    for before, after in itertools.pairwise(by_offset):
        if before.offset + (before.num_bytes or 0) > after.offset:
            broken.append(f"{before.name} and {after.name} overlap")
    return broken


def _values(file: GGUF) -> Iterator[str]:
    for name in file.tensors:
        if not np.isfinite(file.tensor(name)).all():
            yield f"{name} holds numbers that are not finite"


def _show(value: Value | None) -> str:
    return "missing" if value is None else repr(value.data)
