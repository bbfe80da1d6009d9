"""A gated FFN as a module that picks the fastest implementation this machine has, and says which."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import certified, cpu, reference

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "native", "certified", "triton", "reference", "dense")
MAX_SPARSE_ROWS = 8  # beyond, most neurons live for some row and one dense product is faster
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_already_said: set[str] = set()


class SparseFFN(nn.Module):
    """``down(act(gate(x)) * up(x))`` with ReLU (threshold 0) or FATReLU (threshold > 0), skipping dead neurons.

    ``w_gate`` and ``w_up`` are ``[F, D]``, ``w_down`` is nn.Linear's ``[D, F]``; they are detached. Native kernels get
    copies of all three, packed in huge pages; else only down is copied, transposed, unless the pick is dense torch.
    ``x`` is ``[..., D]`` of any float dtype on the weights' device; the output has the dtype of ``x``.

    Up to ``MAX_SPARSE_ROWS`` rows go to the picked implementation, more (prefill) to dense torch, as do inputs that
    need a gradient. ``implementation="auto"`` takes triton on a CUDA device and native on the CPU; where that one is
    missing, dense torch, with one warning. "certified" is native with a screened gate: the same bits, faster for one
    row of float32 weights, and one more byte of memory for each weight of the gate. An implementation asked for by
    name that this machine or dtype cannot have raises RuntimeError instead. ``.implementation`` is the pick and
    ``.why`` the reason. Moving or casting the module picks anew. Raises ValueError on wrong shapes, an unknown
    implementation or a bad threshold, and where ``x`` holds a NaN or an infinity and native kernels are to compute it.
    """

    w_gate: Tensor
    w_up: Tensor
    w_down_t: Tensor

    def __init__(
        self,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        threshold: float,
        implementation: str = "auto",
        num_threads: int = 1,
    ) -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation is {implementation!r}: one of {', '.join(IMPLEMENTATIONS)}")
        if w_gate.ndim != 2 or w_up.shape != w_gate.shape or w_down.shape != w_gate.shape[::-1]:
            raise ValueError(
                f"w_gate {tuple(w_gate.shape)}, w_up {tuple(w_up.shape)}, w_down {tuple(w_down.shape)}: "
                "expected [F, D], [F, D], [D, F]"
            )
        if len({(w.dtype, w.device) for w in (w_gate, w_up, w_down)}) > 1:
            raise ValueError(
                f"w_gate, w_up, w_down are {w_gate.dtype}, {w_up.dtype}, {w_down.dtype}: one dtype, one device"
            )
        self.threshold = reference.check_threshold(threshold)
        self.asked, self.num_threads = implementation, num_threads
        self.register_buffer("w_gate", w_gate.detach().contiguous(), persistent=False)
        self.register_buffer("w_up", w_up.detach().contiguous(), persistent=False)
        self.register_buffer("w_down_t", w_down.detach().t(), persistent=False)
        self._pick()

    def forward(self, x: Tensor) -> Tensor:
        d_model = self.w_gate.shape[1]
        if x.shape[-1] != d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {d_model}]")
        rows = x.reshape(-1, d_model)
        few = 0 < rows.shape[0] <= MAX_SPARSE_ROWS
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = self._sparse(rows) if few and not needs_gradient else self._dense(rows)
        return y.to(x.dtype).view(x.shape)

    def extra_repr(self) -> str:
        d_ff, d_model = self.w_gate.shape
        return f"{d_model}->{d_ff}, threshold={self.threshold:g}, implementation={self.implementation} ({self.why})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseFFN:
        super()._apply(fn, recurse)
        self._pick()  # the kernels hold addresses of the weights, which have just moved
        return self

    def _dense(self, rows: Tensor) -> Tensor:
        """Plain torch in the weights' dtype: what a model without these kernels computes."""
        x = rows.to(self.w_gate.dtype)
        gate = F.linear(x, self.w_gate)
        s = torch.where(reference.kept(gate, self.threshold), gate, torch.zeros_like(gate))
        return F.linear(s * F.linear(x, self.w_up), self.w_down_t.t())

    def _pick(self) -> None:
        """Sets ``implementation``, ``why`` and ``_sparse``, the function of ``[rows, D]`` behind them."""
        wanted = self.asked
        if wanted == "auto":
            wanted = "triton" if self.w_gate.device.type == "cuda" else "native"
        obstacle = _obstacle(wanted, self.w_gate)
        if obstacle and self.asked != "auto":
            raise RuntimeError(f"implementation {wanted!r} cannot be used: {obstacle}")
        if obstacle:
            self.implementation, self.why = "dense", f"{wanted} cannot be used: {obstacle}"
            _say_once(f"sparse FFN falls back to dense torch, without any speed-up: {self.why}")
        else:
            self.implementation = wanted
            self.why = "asked for" if self.asked != "auto" else f"best for {self.w_gate.device.type}"
        # Down is [F, D] either way; in memory dense torch wants rows of w_down, the others rows of its transpose.
        if self.implementation in ("native", "certified"):
            self.w_gate, self.w_up, self.w_down_t = cpu.pack([self.w_gate, self.w_up, self.w_down_t])
        elif self.implementation == "dense":
            self.w_down_t = self.w_down_t.t().contiguous().t()
        else:
            self.w_down_t = self.w_down_t.contiguous()
        self._sparse = self._make(self.implementation)

    def _make(self, implementation: str) -> Callable[[Tensor], Tensor]:
        if implementation == "native":
            return _Native(cpu.NativeFFN(self.w_gate, self.w_up, self.w_down_t, self.num_threads), self.threshold)
        if implementation == "certified":
            screened = certified.CertifiedFFN(self.w_gate, self.w_up, self.w_down_t, self.num_threads)
            return _Native(screened, self.threshold)
        if implementation == "triton":
            from kernels.triton_ffn import TritonFFN

            return _Triton(TritonFFN(self.w_gate, self.w_up, self.w_down_t), self.threshold)
        if implementation == "reference":
            return _Reference((self.w_gate, self.w_up, self.w_down_t), self.threshold)
        return self._dense


class _Native:
    def __init__(self, ffn: cpu.NativeFFN, threshold: float) -> None:
        self.ffn, self.threshold = ffn, threshold

    def __call__(self, rows: Tensor) -> Tensor:
        return self.ffn.ffn(rows.detach().float().contiguous(), self.threshold)


class _Triton:
    def __init__(self, ffn: Any, threshold: float) -> None:
        self.ffn, self.threshold = ffn, threshold

    def __call__(self, rows: Tensor) -> Tensor:
        return self.ffn.ffn(rows.detach(), self.threshold)


class _Reference:
    def __init__(self, weights: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
        self.weights, self.threshold = weights, threshold

    def __call__(self, rows: Tensor) -> Tensor:
        return reference.ffn(rows, *self.weights, self.threshold)


def _obstacle(implementation: str, weight: Tensor) -> str | None:
    """What forbids this implementation for such weights on this machine, or None."""
    device, dtype = weight.device.type, weight.dtype
    if implementation in ("native", "certified"):
        if device != "cpu" or dtype not in cpu.WEIGHT_DTYPES:
            return f"the weights are {dtype} on {device}; native kernels take float32, bfloat16, float16 on cpu"
        if implementation == "certified" and weight.shape[1] > certified.MAX_D_MODEL:
            return f"d_model is {weight.shape[1]}; a certified gate takes at most {certified.MAX_D_MODEL}"
        found = cpu.available()
        return None if found else found.why
    if implementation == "triton":
        if dtype not in TRITON_DTYPES:
            return f"the weights are {dtype}; triton kernels take float32, bfloat16 or float16"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        from kernels.triton_ffn import interpreted

        return None if device == "cuda" or interpreted() else f"the weights are on {device}, triton needs a CUDA device"
    return None


def _say_once(message: str) -> None:
    if message not in _already_said:
        _already_said.add(message)
        logger.warning(message)
