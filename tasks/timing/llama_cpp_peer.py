"""llama.cpp beside the native loop: the dense original in an f16 GGUF file, through the optional package llama_cpp."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput
from prosparse_core.variants import MODEL, load_model
from tasks.timing.decode import Way
from tasks.timing.native_decode import native_model

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse_core.variants import Variant

PACKAGE = "llama-cpp-python"
PROVIDER = "llama_cpp"
DTYPE = "float16"


def version() -> str | None:
    """Of the installed package; None where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        return importlib.metadata.version(PACKAGE.replace("-", "_"))
    except importlib.metadata.PackageNotFoundError:
        return "?"


def ways(original: Variant | None, scratch: Path, capacity: int, threads: int) -> tuple[list[Way], str | None]:
    """(llama.cpp and our own dense loop on the same dense weights in f16, None), or (none, why not)."""
    if version() is None:
        return [], f"{PACKAGE} is not installed"
    if original is None:
        return [], "the dense original is not at hand"
    import torch

    from kernels.decoder import Decoder
    from prosparse_core.formats.gguf_dense import write_dense_gguf

    folder = original.checkpoint.path / MODEL
    path = scratch / "original.f16.gguf"
    try:
        write_dense_gguf(folder, path)
        model, _ = load_model(folder)
        packed = native_model(model, capacity=capacity, dtype=torch.float16)
        peer = _LlamaCpp(path, capacity, threads)
    except (BadInput, ValueError, OSError) as error:
        return [], str(error)
    finally:
        path.unlink(missing_ok=True)  # it is mapped into memory, if it is used
    del model
    decoder = Decoder(packed, ffn="dense", num_threads=threads)

    def begin(prompt: Tensor) -> None:
        decoder.rewind()
        decoder.feed(prompt[0].tolist())

    own = Way("native_dense", DTYPE, None, lambda token: decoder.feed((token,)), begin, decoder)
    about = f"f16 of the dense original, {original.source_precision or 'of unrecorded precision'}"
    own.note = about
    other = Way(PROVIDER, DTYPE, None, peer.step, peer.begin)
    other.note = f"{PACKAGE} {version()}, {about}"
    return [own, other], None


class _LlamaCpp:
    """One sequence; its logits are read where llama.cpp leaves them."""

    def __init__(self, path: Path, capacity: int, threads: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._llm: Any = llama_cpp.Llama(
            str(path),
            n_ctx=max(capacity, 64),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def begin(self, prompt: Tensor) -> None:
        self._llm.reset()
        self._llm.eval(prompt[0].tolist())

    def step(self, token: int) -> Tensor:
        import numpy as np
        import torch

        self._llm.eval([token])
        pointer = self._library.llama_get_logits(self._llm.ctx)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(self._llm.n_vocab(),)))
