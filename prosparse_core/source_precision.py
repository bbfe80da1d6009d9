"""In which precision the weights came, before they were made what every step computes with: part of what "original"
means. A dequantised file has the values of its quantisation, and training may repair what that took."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

KEY = "prosparse_source_precision"
"""Of config.json: it goes with the weights through every stage and export."""
RANDOM = "fp32 random"
_FLOATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_LEAST_SHARE = 0.01
"""Of the bytes of the matrices: what is less has no say in their precision."""


def named(model: str, precision: str | None) -> str:
    """``smollm2-135m-instruct, Q4_1 dequantised``: how every table names a model."""
    return model if not precision else f"{model}, {precision}"


def of_config(config: Mapping[str, Any]) -> str | None:
    """What a config.json says; None where nobody recorded it."""
    found = config.get(KEY)
    return found if isinstance(found, str) else None


def of_gguf(path: Path) -> str:
    """The types of a GGUF's matrices, largest share of bytes first: ``Q4_K + Q6_K dequantised``, ``fp16``.

    Embeddings and output head, where their types are others than the layers', are said apart.
    """
    import gguf

    layers: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if len(tensor.shape) > 1:  # norms and biases are kept in fp32 by every quantisation
            part = layers if tensor.name.startswith("blk.") else ends
            part[tensor.tensor_type.name] += int(tensor.n_bytes)
    inside, outside = _largest(layers), _largest(ends)
    told = _words(inside or outside)
    if inside and set(outside) - set(inside):
        told += f" (embeddings {' + '.join(_FLOATS.get(t, t) for t in outside)})"
    return told


def _words(types: list[str]) -> str:
    is_quantised = any(t not in _FLOATS for t in types)
    return " + ".join(_FLOATS.get(t, t) for t in types) + (" dequantised" if is_quantised else "")


def of_files(files: Iterable[Path]) -> tuple[str, int] | None:
    """(the dtypes of the matrices in safetensors files, such as ``bf16`` or ``bf16 + fp32``; bits of the widest).

    None without any file.
    """
    stored: Counter[str] = Counter()
    for path in files:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and len(entry["shape"]) > 1:
                start, end = entry["data_offsets"]
                stored[entry["dtype"]] += end - start if prod(entry["shape"]) else 0
    types = _largest(stored)
    if not types:
        return None
    return " + ".join(_FLOATS.get(t, t.lower()) for t in types), max(_BITS.get(t, 8) for t in types)


def of_folders(source: Path | None, kept: Path) -> str | None:
    """Of a model that was read from ``source`` (None: not at hand, such as the hub's cache) and saved in ``kept``: what
    the source stored, or what was kept of it where that is narrower (its config asks for another dtype)."""
    found = of_files(sorted(kept.glob("*.safetensors")))
    stored = None if source is None else of_files(sorted(source.glob("*.safetensors")))
    if found is None or stored is None:
        return found[0] if found else None
    return stored[0] if stored[1] <= found[1] else found[0]


def _largest(counted: Counter[str]) -> list[str]:
    total = sum(counted.values())
    return [name for name, size in counted.most_common() if size >= _LEAST_SHARE * total]
