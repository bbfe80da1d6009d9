"""Binding of the native CPU kernels (``cpu.cpp``): float32, bfloat16 or float16 weights, float32 vectors and sums.

A ``NativeFFN`` checks its weights once, pins them and owns its scratch memory, so that a call costs a few
microseconds. No bit of a token's results depends on the number of threads, on the tokens beside it in a call, or
on whether dead rows are skipped. Calls hold the interpreter's lock: two Python threads cannot meet in one scratch.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from kernels import build
from kernels.reference import check_threshold

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_THREADS = 256
_CACHE_LINE_BYTES = 64
_HUGE_PAGE_BYTES = 2 << 20


class Plan(ctypes.Structure):
    """What the kernels need to know of one FFN: ``struct Plan`` of cpu_plan.h."""

    _fields_ = [
        ("w_gate", ctypes.c_void_p),
        ("w_up", ctypes.c_void_p),
        ("w_down_t", ctypes.c_void_p),
        ("d_ff", ctypes.c_int64),
        ("d_model", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("skip_dead", ctypes.c_int64),
        ("live_row", ctypes.c_void_p),
        ("live_value", ctypes.c_void_p),
        ("live_count", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("screen", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("screen_x", ctypes.c_void_p),
        ("screen_width", ctypes.c_int64),
        ("screen_floor", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Availability:
    """Whether the native kernels can be used, and why (not). True or false as a condition."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok


class NativeLibrary:
    """The loaded library.

    ``openmp``: more than one thread is possible; ``vector_bits``: width of its vectors; ``batch``: tokens that share
    one reading of the weights; ``parts``: at most so many threads sum y; ``screen_step``: see ``certified.py``.
    """

    def __init__(self, made: build.Build) -> None:
        self.build = made
        handle = ctypes.PyDLL(str(made.path))
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        plan = ctypes.POINTER(Plan)
        self.gate = _bind(handle, "psk_gate", integer, plan, pointer, pointer, real, integer)
        self.s2 = _bind(handle, "psk_s2", integer, plan, pointer, pointer, pointer, integer)
        self.s3 = _bind(handle, "psk_s3", None, plan, pointer, pointer, integer)
        self.ffn = _bind(handle, "psk_ffn", integer, plan, pointer, pointer, real, integer)
        self.gemv = _bind(handle, "psk_gemv", None, pointer, pointer, pointer, integer, integer, integer, integer)
        self.decode = _bind(handle, "psk_decode", integer, pointer, pointer, integer, integer, integer, pointer)
        self.read = _bind(handle, "psk_read", real, pointer, integer, integer, integer, integer)
        self.huge_pages = _bind(handle, "psk_huge_pages", integer, pointer, integer)
        self.openmp = bool(_bind(handle, "psk_has_openmp", integer)())
        self.vector_bits, self.batch, self.parts, self.screen_step = (
            int(_bind(handle, f"psk_{name}", integer)()) for name in ("vector_bits", "batch", "parts", "screen_step")
        )

    def check_threads(self, num_threads: int) -> None:
        """ValueError if this library cannot run that many threads."""
        if not 1 <= num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads is {num_threads}: it must lie in 1..{MAX_THREADS}")
        if num_threads > 1 and not self.openmp:
            raise ValueError(
                f"num_threads is {num_threads}, but {self.build.compiler} built the kernels without OpenMP; install it "
                f"and delete {self.build.path}, or use one thread"
            )


def _bind(handle: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
    function = getattr(handle, name)
    function.restype = result
    function.argtypes = arguments
    return function


_library: NativeLibrary | None = None
_failure: str | None = None


def load() -> NativeLibrary:
    """The native kernels, compiled on first use. RuntimeError, always the same, if this machine cannot have them."""
    global _library, _failure
    if _library is not None:
        return _library
    if _failure is None:
        try:
            _library = _open(build.build())
            return _library
        except RuntimeError as error:
            _failure = str(error)
    raise RuntimeError(_failure)


def _open(made: build.Build) -> NativeLibrary:
    try:
        return NativeLibrary(made)
    except (OSError, AttributeError):  # a cached file that is damaged: make it once more
        made.path.unlink(missing_ok=True)
    made = build.build()
    try:
        return NativeLibrary(made)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"native kernels: {made.path} was compiled but cannot be loaded: {error}") from error


def available() -> Availability:
    """Whether ``load()`` works here (it is tried), with the reason or what was loaded."""
    try:
        library = load()
    except RuntimeError as error:
        return Availability(False, str(error))
    threads = "OpenMP" if library.openmp else "one thread"
    return Availability(True, f"{library.vector_bits}-bit vectors, {threads}, {library.build.compiler}")


def gemv(weight: Tensor, x: Tensor, out: Tensor | None = None, *, num_threads: int = 1) -> Tensor:
    """Dense ``weight [N, D] @ x [D] -> [N]``, float32; our own dense baseline. ValueError on a wrong argument."""
    library = load()
    library.check_threads(num_threads)
    _check_weight("weight", weight, weight.shape)
    _check_vector("x", x, weight.shape[1], 1)
    if out is None:
        out = torch.empty(weight.shape[0])
    else:
        _check_vector("out", out, weight.shape[0], 1)
        _check_apart(out, x)
    code = WEIGHT_DTYPES.index(weight.dtype)
    library.gemv(weight.data_ptr(), x.data_ptr(), out.data_ptr(), *weight.shape, code, num_threads)
    return out


def pack(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Contiguous copies, one after another in one block of memory for which huge pages are asked.

    With a ``dtype`` every matrix (of two dimensions or more) is copied in that type, everything else as it is.

    Weights so packed are read 5-10 % faster (fewer address translations), by dense and sparse kernels alike. Where the
    system grants no huge pages, these are plain copies. They share one storage, freed with the last of them.
    """
    types = [dtype if dtype is not None and tensor.ndim > 1 else tensor.dtype for tensor in tensors]
    sizes = [tensor.numel() * kind.itemsize for tensor, kind in zip(tensors, types, strict=True)]
    starts = list(itertools.accumulate((-(-n // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES for n in sizes), initial=0))
    total = starts.pop()
    block = torch.empty(total + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    offset = -block.data_ptr() % _HUGE_PAGE_BYTES
    load().huge_pages(block.data_ptr() + offset, -(-total // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES)
    packed = []
    for tensor, kind, start, size in zip(tensors, types, starts, sizes, strict=True):
        part = block[offset + start : offset + start + size].view(kind).view(tensor.shape)
        packed.append(part.copy_(tensor))
    return packed


class NativeFFN:
    """One gated FFN on the CPU. The weights are ``[F, D]``, contiguous, all float32, all bfloat16 or all float16.

    ``skip_dead=False`` is the dense twin: the same results by reading every row. ``num_live`` is the number of live
    neurons of the last ``ffn`` call, summed over its tokens. ``x``, ``s``, ``x1`` and ``out`` are contiguous float32,
    ``[width]`` or ``[tokens, width]``. Up to eight tokens share one reading of the rows that live for any of them;
    more are computed eight by eight. Raises ValueError on a wrong argument, which a NaN or an infinity in ``x`` is
    too, and RuntimeError where the kernels cannot be built.
    """

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, num_threads: int = 1, *, skip_dead: bool = True
    ) -> None:
        for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
            _check_weight(name, weight, w_gate.shape)
            if weight.dtype != w_gate.dtype:
                raise ValueError(f"{name} is {weight.dtype}, w_gate is {w_gate.dtype}: all three must be the same")
        self._library = load()
        self._library.check_threads(num_threads)
        self.weights = (w_gate, w_up, w_down_t)
        self.d_ff, self.d_model = (int(n) for n in w_gate.shape)
        self.num_threads, self.skip_dead, self.num_live = num_threads, skip_dead, 0
        line = _CACHE_LINE_BYTES // 4
        self._lists = (
            torch.empty(self.d_ff, dtype=torch.int32),
            torch.empty(self.d_ff),
            torch.zeros(2 * num_threads, dtype=torch.int64),
        )
        plan = Plan(
            *(weight.data_ptr() for weight in self.weights),
            d_ff=self.d_ff,
            d_model=self.d_model,
            num_threads=num_threads,
            dtype=WEIGHT_DTYPES.index(w_gate.dtype),
            skip_dead=skip_dead,
            stride=-(-self.d_model // line) * line,  # threads never write to one cache line
        )
        plan.live_row, plan.live_value, plan.live_count = (scratch.data_ptr() for scratch in self._lists)
        self._plan = ctypes.pointer(plan)
        self._most_tokens = 0
        self._make_room(1)

    def _make_room(self, tokens: int) -> None:
        """Scratch for calls of so many tokens: for one at first, for a whole batch when the first one comes."""
        plan, parts = self._plan.contents, self._library.parts if self.num_threads > 1 else 1
        self._sums = (torch.empty(tokens * self.d_ff), torch.empty(parts * tokens * plan.stride))
        plan.dense, plan.partial = (scratch.data_ptr() for scratch in self._sums)
        self._most_tokens = tokens

    def __reduce__(self) -> tuple[object, ...]:  # copies and pickles carry the weights; addresses are made anew
        return _rebuild, (type(self), *self.weights, self.num_threads, self.skip_dead)

    def gate(self, x: Tensor, threshold: float = 0.0, out: Tensor | None = None) -> Tensor:
        """``s [..., F]``: the gate's value where kept (``>= threshold``, for threshold 0 ``> 0``), 0 elsewhere."""
        tokens = self._tokens(x)
        _check_vector("x", x, self.d_model, tokens)
        out = self._output(out, x, self.d_ff, tokens)
        done = self._library.gate(self._plan, x.data_ptr(), out.data_ptr(), check_threshold(threshold), tokens)
        return out if done >= 0 else _refuse(x)

    def s2(self, s: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x1 [..., F] = s * (x w_up^T)``; rows of ``w_up`` whose ``s`` is 0 for every token are not read."""
        tokens = self._tokens(x)
        _check_vector("x", x, self.d_model, tokens)
        _check_vector("s", s, self.d_ff, tokens)
        out = self._output(out, x, self.d_ff, tokens, s)
        done = self._library.s2(self._plan, s.data_ptr(), x.data_ptr(), out.data_ptr(), tokens)
        return out if done >= 0 else _refuse(x)

    def s3(self, x1: Tensor, out: Tensor | None = None) -> Tensor:
        """``y [..., D] = x1 w_down_t``; rows of ``w_down_t`` whose ``x1`` is 0 for every token are not read."""
        tokens = self._tokens(x1)
        _check_vector("x1", x1, self.d_ff, tokens)
        out = self._output(out, x1, self.d_model, tokens)
        self._library.s3(self._plan, x1.data_ptr(), out.data_ptr(), tokens)
        return out

    def ffn(self, x: Tensor, threshold: float = 0.0, out: Tensor | None = None) -> Tensor:
        """``y [..., D]``, exact: gate on every row, up and down on the live rows alone, in one parallel region."""
        tokens = self._tokens(x)
        _check_vector("x", x, self.d_model, tokens)
        out = self._output(out, x, self.d_model, tokens)
        done = self._library.ffn(self._plan, x.data_ptr(), out.data_ptr(), check_threshold(threshold), tokens)
        if done < 0:
            _refuse(x)
        self.num_live = done
        return out

    def _tokens(self, x: Tensor) -> int:
        tokens = x.shape[0] if x.ndim > 1 else 1
        if tokens > self._most_tokens:
            self._make_room(self._library.batch)
        return tokens

    @staticmethod
    def _output(out: Tensor | None, like: Tensor, width: int, tokens: int, *inputs: Tensor) -> Tensor:
        if out is None:
            return torch.empty((width,) if like.ndim == 1 else (tokens, width))
        _check_vector("out", out, width, tokens)
        for read in (like, *inputs):
            _check_apart(out, read)
        return out


def _rebuild(
    kind: type[NativeFFN], w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, num_threads: int, skip_dead: bool
) -> NativeFFN:
    return kind(w_gate, w_up, w_down_t, num_threads, skip_dead=skip_dead)


def _check_weight(name: str, weight: Tensor, shape: torch.Size) -> None:
    if weight.dtype not in WEIGHT_DTYPES or weight.device.type != "cpu":
        raise ValueError(
            f"{name} is {weight.dtype} on {weight.device}: native kernels take float32, bfloat16, float16 on cpu"
        )
    if weight.ndim != 2 or weight.shape != shape or 0 in weight.shape:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected [F, D] = {tuple(shape)} (down transposed)")
    if not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous: its rows must follow each other; pass {name}.contiguous()")


def _check_vector(name: str, vector: Tensor, width: int, tokens: int) -> None:
    shape = vector.shape  # this runs at every call: cheap properties only
    right_shape = shape == (tokens, width) or (tokens == 1 and shape == (width,))
    if right_shape and vector.dtype is torch.float32 and vector.is_cpu and vector.is_contiguous():
        return
    raise ValueError(
        f"{name} is {vector.dtype} {tuple(vector.shape)} on {vector.device}, contiguous={vector.is_contiguous()}: "
        f"expected contiguous float32 [{width}] or [{tokens}, {width}] on cpu"
    )


def _check_apart(out: Tensor, read: Tensor) -> None:
    start, other = out.data_ptr(), read.data_ptr()
    if start < other + 4 * read.numel() and other < start + 4 * out.numel():
        raise ValueError("out shares memory with an input, which is still read while out is written; pass another")


def _refuse(x: Tensor) -> NoReturn:
    place = tuple(int(i) for i in (~x.isfinite()).nonzero()[0])
    raise ValueError(f"x holds {float(x[place])} at {list(place)}: a gate of it says nothing, so nothing is computed")
