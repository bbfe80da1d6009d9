"""A tiny ReLU model with predictors as a PowerInfer file, and a way to write the same file with something broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import tiny

from prosparse_core import predictor as predictors
from prosparse_core.formats.powerinfer_file import GGUF, Value, read_gguf
from prosparse_core.predictor import LayerPredictor
from prosparse_core.store import Artifact
from prosparse_core.substitute import use_relu
from prosparse_core.variants import MODEL, Variant

_FORMS = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
WORDS = ["a", "b", "c", "Ġ", "ab", "Ġa"]


def tokenizer_json(num_tokens: int) -> dict[str, Any]:
    """Byte-level BPE by hand: two control tokens, a few letters, two merges, then single characters."""
    tokens = ["<s>", "</s>", *WORDS, *(chr(0x4E00 + i) for i in range(num_tokens - len(WORDS) - 2))]
    special = [{"id": i, "content": t, "special": True} for i, t in enumerate(tokens[:2])]
    steps = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    vocabulary = {t: i for i, t in enumerate(tokens) if i >= 2}
    merges = [["a", "b"], ["Ġ", "a"]]
    return {
        "added_tokens": special,
        "pre_tokenizer": steps,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": False},
    }


def model_folder(folder: Path, **changes: Any) -> Path:
    """A tiny llama whose predictors matter: weights large enough that attention and FFN move the logits.

    All of them are f16 numbers, so that no rounding moves a neuron across a cutoff.
    """
    settings = {"vocab_size": 40, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, **changes}
    model = tiny(changes.pop("model_type", "llama"), **{k: v for k, v in settings.items() if k != "model_type"})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.uniform_(0.3, 2.0, generator=torch.Generator().manual_seed(7))
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    use_relu(model)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(settings["vocab_size"])), encoding="utf-8")
    return folder


def random_predictors(num_layers: int = 3, d_model: int = 32, d_ff: int = 53, hidden: int = 12) -> list[LayerPredictor]:
    """Of f16 numbers, too."""
    found = [LayerPredictor(d_model, d_ff, hidden, torch.Generator().manual_seed(i)) for i in range(num_layers)]
    return [p.half().float() for p in found]


def artifact(folder: Path, found: Sequence[LayerPredictor], **meta: Any) -> Path:
    """A predictor artifact as far as an export reads it."""
    folder.mkdir(parents=True)
    for layer, one in enumerate(found):
        predictors.save(one, folder, layer)
    (folder / "artifact.json").write_text(json.dumps({"meta": meta}), encoding="utf-8")
    return folder


def variant(folder: Path, activation: str = "relu", **parts: Any) -> Variant:
    """``folder/model`` as a checkpoint."""
    assert (folder / MODEL).is_dir()
    return Variant("prosparse", Artifact("stage", "s", "0" * 64, "1" * 64, folder), activation, **parts)


def rewrite(
    path: Path,
    *,
    magic: bytes | None = None,
    version: int = 3,
    keys: Mapping[str, Value | None] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, int] | None] | None = None,
    cut: int = 0,
    shift: int = 0,
) -> None:
    """Write a file again with some keys and tensors (array as stored, GGML type) changed, added or, as None, left out.

    ``shift`` moves where tensors are said to lie; ``cut`` takes bytes off the end.
    """
    file: GGUF = read_gguf(path)
    all_keys = {k: v for k, v in {**file.keys, **(keys or {})}.items() if v is not None}
    stored: dict[str, tuple[np.ndarray, int] | None] = {name: _stored(file, name) for name in file.tensors}
    all_tensors = {k: v for k, v in {**stored, **(tensors or {})}.items() if v is not None}
    head = (magic or file.magic) + struct.pack("<IQQ", version, len(all_tensors), len(all_keys))
    for key, value in all_keys.items():
        head += _string(key) + struct.pack("<I", value.kind) + _value(value)
    offset, body = 0, b""
    for name, (array, kind) in all_tensors.items():
        shape = array.shape if kind < 2 else (array.shape[0], array.shape[1] // 18 * 32)
        head += _string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", n) for n in reversed(shape)) + struct.pack("<IQ", kind, offset + shift)
        data = np.ascontiguousarray(array).tobytes()
        body += data + b"\0" * (-len(data) % 32)
        offset = len(body)
    whole = head + b"\0" * (-len(head) % 32) + body
    path.write_bytes(whole[: len(whole) - cut])


def _stored(file: GGUF, name: str) -> tuple[np.ndarray, int]:
    kind = file.tensors[name].kind
    assert kind in (0, 1)
    return file.tensor(name).astype(np.float32 if kind == 0 else np.float16), kind


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if value.kind == 8:
        return _string(value.data)
    if value.kind != 9:
        return struct.pack(_FORMS[value.kind], value.data)
    assert value.entries is not None
    entries = b"".join(_value(Value(value.entries, v)) for v in value.data)
    return struct.pack("<IQ", value.entries, len(value.data)) + entries
