"""Reading a GGUF file byte by byte, with nothing of the library that writes it: what is checked is what is there."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core.errors import BadInput

U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", U32: "<I", I32: "<i", F32: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GGML_F32, GGML_F16, GGML_Q4_0 = 0, 1, 2
BLOCK_BYTES = {GGML_F32: (1, 4), GGML_F16: (1, 2), GGML_Q4_0: (32, 18), 3: (32, 20), 6: (32, 22), 8: (32, 34)}
"""By GGML type: numbers a block, bytes a block; the types that were common in late 2023."""
ALIGNMENT = 32


@dataclass(frozen=True)
class Value:
    """One key's value with its type; of an array, also the type of its entries."""

    kind: int
    data: Any
    entries: int | None = None


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is numpy's: rows first."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """From the beginning of the data."""

    @property
    def num_bytes(self) -> int | None:
        """None for a type we do not know."""
        if self.kind not in BLOCK_BYTES:
            return None
        block, size = BLOCK_BYTES[self.kind]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class GGUF:
    """A file as it lies on the disk; tensors are read when they are asked for."""

    path: Path
    magic: bytes
    version: int
    keys: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    num_bytes: int

    def tensor(self, name: str) -> np.ndarray:
        """The numbers of a tensor as fp32, in numpy's shape."""
        info = self.tensors[name]
        assert info.num_bytes is not None, f"{name} is of GGML type {info.kind}"
        raw = np.fromfile(self.path, np.uint8, info.num_bytes, offset=self.data_start + info.offset)
        if info.kind == GGML_Q4_0:
            return _from_q4_0(raw).reshape(info.shape)
        assert info.kind in (GGML_F32, GGML_F16), f"{name} is of GGML type {info.kind}"
        return raw.view("<f4" if info.kind == GGML_F32 else "<f2").astype(np.float32).reshape(info.shape)


def _from_q4_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: an f16 scale, then 16 bytes: low halves are the first 16 numbers + 8, high ones the others."""
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    halves = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return scale * (halves.astype(np.float32) - 8)


def read_gguf(path: Path) -> GGUF:
    """The structure of a file with any four bytes at its beginning.

    Raises:
        BadInput: not readable, not the structure of a GGUF file, or cut off.
    """
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).read()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, struct.error, IndexError, KeyError, MemoryError) as error:
        raise BadInput(f"{path} has not the structure of a GGUF file: {error!r}") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def read(self) -> GGUF:
        magic, version = self._bytes(4), self._scalar(U32)
        num_tensors, num_keys = self._scalar(10), self._scalar(10)
        keys: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in keys:
                raise ValueError(f"key {key} is there twice")
            keys[key] = self._value(self._scalar(U32))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in tensors:
                raise ValueError(f"tensor {name} is there twice")
            shape = tuple(reversed([self._scalar(10) for _ in range(self._scalar(U32))]))
            tensors[name] = TensorInfo(name, shape, self._scalar(U32), self._scalar(10))
        alignment = keys.get("general.alignment", Value(U32, ALIGNMENT)).data
        start = -(-self._at // alignment) * alignment
        return GGUF(self._path, magic, version, keys, tensors, start, len(self._data))

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError(f"the file ends within {count} bytes from byte {self._at} on")
        self._at += count
        return self._data[self._at - count : self._at]

    def _scalar(self, kind: int) -> Any:
        form = _SCALARS[kind]
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar(10)).decode("utf-8")

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return Value(kind, self._string())
        if kind != ARRAY:
            return Value(kind, self._scalar(kind))
        entries, count = self._scalar(U32), self._scalar(10)
        if count > len(self._data):
            raise ValueError(f"an array of {count} entries in a file of {len(self._data)} bytes")
        return Value(kind, [self._value(entries).data for _ in range(count)], entries)
