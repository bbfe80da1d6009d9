"""transformers' own reading of a GGUF, once and with progress."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.step import Work


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """transformers opens a GGUF four times, vocabulary and all, and lists its names anew for each tensor."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def reported(reader: Any, work: Work) -> Iterator[None]:
    """The library's own progress bar over the tensors of a GGUF, told to our progress instead of drawn."""
    bar = reader.tqdm

    def tensors(found: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(found, start=1):
            yield tensor
            work.progress.update(done, len(found) + 1)

    reader.tqdm = tensors
    try:
        yield
    finally:
        reader.tqdm = bar
