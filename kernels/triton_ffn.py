# mypy: disable-error-code="no-untyped-def"
# (the arguments of a jitted function are triton's values, which have no Python type)
"""GPU kernels of the sparse gated FFN in Triton, for one token at a time and any shape.

Layouts and meaning are those of ``kernels/reference.py``: three ``[F, D]`` matrices in float32, bfloat16 or float16,
sums in float32. The exact FFN is two launches and a clear: ``gate_up_kernel`` reads the whole gate, reads ``w_up`` on
the live rows alone and appends (row, x1) to a list; ``down_kernel`` splits that list over the grid and adds into y.
The number of live rows stays on the device: nothing waits for the host, so the FFN can be captured in a CUDA graph.

Atomics make the order of that list, and so the rounding of y, vary from run to run. ``deterministic=True`` takes two
more launches instead: a list in row order, and partial sums added in a fixed order.

Under ``TRITON_INTERPRET=1`` (set before this module is imported) everything runs on the CPU, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import check_threshold

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """Launch shape. A tile of the gate and of up is rows x cols; one of down is list_rows x list_cols."""

    rows: int = 16
    cols: int = 256
    list_rows: int = 8
    list_cols: int = 256
    split: int = 32  # programs that share the list for one block of columns
    num_warps: int = 4
    num_stages: int = 3


SCAN = 1024  # neurons that one step of compact_kernel looks at


@triton.jit
def _dot_rows(x_ptr, w_ptr, rows, mask, D, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr):
    """x . w[rows] for the rows under the mask; masked rows are not read."""
    cols = tl.arange(0, COLS)
    base = rows.to(tl.int64)[:, None] * D
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in tl.range(0, D, COLS, num_stages=STAGES):
        k = start + cols
        w = tl.load(
            w_ptr + base + k[None, :],
            mask=mask[:, None] & (k < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + k, mask=k < D, other=0.0, eviction_policy="evict_last")
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, list_row_ptr, list_value_ptr, count_ptr, x1_ptr, F, D, threshold,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """x1 of ROWS neurons. APPEND: live ones go to the list, in any order; else all go to x1, zeros included."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < F
    gate = _dot_rows(x_ptr, gate_ptr, rows, inside, D, ROWS, COLS, STAGES)
    live = inside & tl.where(threshold > 0.0, gate >= threshold, gate > 0.0)
    num_live = tl.sum(live.to(tl.int32), 0)
    value = tl.zeros((ROWS,), dtype=tl.float32)
    if num_live > 0:
        value = tl.where(live, gate * _dot_rows(x_ptr, up_ptr, rows, live, D, ROWS, COLS, STAGES), 0.0)
        if APPEND:
            place = tl.atomic_add(count_ptr, num_live) + tl.cumsum(live.to(tl.int32), 0) - 1
            tl.store(list_row_ptr + place, rows, mask=live)
            tl.store(list_value_ptr + place, value, mask=live)
    if not APPEND:
        tl.store(x1_ptr + rows, value, mask=inside)


@triton.jit
def s2_kernel(
    s_ptr, x_ptr, up_ptr, x1_ptr, F, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x1 = s * (x w_up^T) for ROWS neurons; rows whose s is 0 are not read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < F
    s = tl.load(s_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    live = inside & (s != 0.0)
    value = tl.zeros((ROWS,), dtype=tl.float32)
    if tl.sum(live.to(tl.int32), 0) > 0:
        value = tl.where(live, s * _dot_rows(x_ptr, up_ptr, rows, live, D, ROWS, COLS, STAGES), 0.0)
    tl.store(x1_ptr + rows, value, mask=inside)


@triton.jit
def compact_kernel(x1_ptr, list_row_ptr, list_value_ptr, count_ptr, F, SCAN_ROWS: tl.constexpr):
    """The list of live neurons in row order. One program: a running offset needs no atomics and has one result."""
    count = 0
    for start in range(0, F, SCAN_ROWS):
        rows = start + tl.arange(0, SCAN_ROWS)
        value = tl.load(x1_ptr + rows, mask=rows < F, other=0.0).to(tl.float32)
        live = value != 0.0
        place = count + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(list_row_ptr + place, rows, mask=live)
        tl.store(list_value_ptr + place, value, mask=live)
        count += tl.sum(live.to(tl.int32), 0)
    tl.store(count_ptr, count)


@triton.jit
def down_kernel(
    list_row_ptr, list_value_ptr, count_ptr, down_ptr, y_ptr, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """COLS values of y from one part in SPLIT of the list. ATOMIC: added into y[D]; else stored in y[SPLIT, D]."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    count = tl.load(count_ptr)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in tl.range(part * ROWS, count, SPLIT * ROWS, num_stages=STAGES):
        place = start + tl.arange(0, ROWS)
        listed = place < count
        row = tl.load(list_row_ptr + place, mask=listed, other=0)
        value = tl.load(list_value_ptr + place, mask=listed, other=0.0)
        w = tl.load(
            down_ptr + row.to(tl.int64)[:, None] * D + cols[None, :],
            mask=listed[:, None] & (cols < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += w.to(tl.float32) * value[:, None]
    y = tl.sum(total, 0)
    if ATOMIC:
        tl.atomic_add(y_ptr + cols, y, mask=cols < D, sem="relaxed")
    else:
        tl.store(y_ptr + part * D + cols, y, mask=cols < D)


@triton.jit
def reduce_kernel(part_ptr, y_ptr, D, SPLIT: tl.constexpr, COLS: tl.constexpr):
    """y = the sum of the SPLIT parts, in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    parts = tl.arange(0, SPLIT)
    values = tl.load(part_ptr + parts[:, None] * D + cols[None, :], mask=(cols < D)[None, :], other=0.0)
    tl.store(y_ptr + cols, tl.sum(values, 0), mask=cols < D)


def interpreted() -> bool:
    """Whether this module's kernels run in the interpreter, on the CPU (decided when it was imported)."""
    return not isinstance(gate_up_kernel, triton.runtime.JITFunction)


class TritonFFN:
    """One gated FFN on a CUDA device (or on the CPU under the interpreter).

    Weights are contiguous ``[F, D]`` of one dtype and device; ``x`` is ``[D]`` or ``[tokens, D]`` of any float dtype
    on that device, tokens are computed one after another. Results are float32 for s2 and s3, the dtype of ``x`` for
    ffn. Scratch memory is allocated once and of fixed size: use one object per stream. Raises ValueError on a wrong
    argument.
    """

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, *, deterministic: bool = False, tiles: Tiles | None = None
    ) -> None:
        for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
            if weight.ndim != 2 or weight.shape != w_gate.shape or 0 in weight.shape or not weight.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(weight.shape)}, contiguous={weight.is_contiguous()}: "
                    f"expected contiguous [F, D] = {tuple(w_gate.shape)} (down transposed)"
                )
            if weight.dtype not in WEIGHT_DTYPES or (weight.dtype, weight.device) != (w_gate.dtype, w_gate.device):
                raise ValueError(f"{name} is {weight.dtype} on {weight.device}: one of {WEIGHT_DTYPES}, all the same")
        self.weights, self.deterministic, self.tiles = (w_gate, w_up, w_down_t), deterministic, tiles or Tiles()
        if triton.next_power_of_2(self.tiles.split) != self.tiles.split:
            raise ValueError(f"tiles.split is {self.tiles.split}: it must be a power of two")
        self.d_ff, self.d_model = (int(n) for n in w_gate.shape)
        device = w_gate.device
        self._row = torch.empty(self.d_ff, dtype=torch.int32, device=device)
        self._value = torch.empty(self.d_ff, device=device)
        self._x1 = torch.empty(self.d_ff, device=device)
        self._part = torch.empty(self.tiles.split if deterministic else 0, self.d_model, device=device)
        self._count_and_y = torch.empty(4 + self.d_model, device=device)  # one clear for both; y stays 16-byte aligned
        self._count, self._y = self._count_and_y[:1].view(torch.int32), self._count_and_y[4:]

    @property
    def num_live(self) -> int:
        """Live neurons of the last token of ``ffn``, or listed rows of ``s3``. Waits for the device."""
        return int(self._count)

    def s2(self, s: Tensor, x: Tensor) -> Tensor:
        """``x1 [..., F] = s * (x w_up^T)``, float32; rows of ``w_up`` whose ``s`` is 0 are not read."""
        x, s = self._rows("x", x, self.d_model), self._rows("s", s, self.d_ff)
        tokens = x.view(-1, self.d_model)
        x1 = torch.empty(s.shape, device=s.device)
        if x.shape[:-1] != s.shape[:-1]:
            raise ValueError(f"x is {tuple(x.shape)} and s is {tuple(s.shape)}: they must hold the same tokens")
        grid = (triton.cdiv(self.d_ff, self.tiles.rows),)
        for token, s_token, out in zip(tokens, s.view(-1, self.d_ff), x1.view(-1, self.d_ff), strict=True):
            s2_kernel[grid](
                s_token, token, self.weights[1], out, self.d_ff, self.d_model,
                ROWS=self.tiles.rows, COLS=self.tiles.cols, STAGES=self.tiles.num_stages,
                num_warps=self.tiles.num_warps,
            )  # fmt: skip
        return x1

    def s3(self, x1: Tensor) -> Tensor:
        """``y [..., D] = x1 w_down_t``, float32; rows of ``w_down_t`` whose ``x1`` is 0 are not read."""
        x1 = self._rows("x1", x1, self.d_ff)
        y = torch.empty(*x1.shape[:-1], self.d_model, device=x1.device)
        for token, out in zip(x1.view(-1, self.d_ff), y.view(-1, self.d_model), strict=True):
            self._y.zero_()
            self._compact(token)
            self._down(out)
        return y

    def ffn(self, x: Tensor, threshold: float = 0.0) -> Tensor:
        """``y [..., D]``, exact: gate on every row, up and down on the live rows alone. The dtype of ``x``."""
        x, threshold = self._rows("x", x, self.d_model), check_threshold(threshold)
        y = torch.empty(x.shape, device=x.device)
        for token, out in zip(x.view(-1, self.d_model), y.view(-1, self.d_model), strict=True):
            self._count_and_y.zero_()
            self._gate_up(token, threshold)
            if self.deterministic:
                self._compact(self._x1)
            self._down(out)
        return y.to(x.dtype)

    def _gate_up(self, token: Tensor, threshold: float) -> None:
        gate_up_kernel[(triton.cdiv(self.d_ff, self.tiles.rows),)](
            token, self.weights[0], self.weights[1], self._row, self._value, self._count, self._x1,
            self.d_ff, self.d_model, threshold,
            ROWS=self.tiles.rows, COLS=self.tiles.cols, STAGES=self.tiles.num_stages, APPEND=not self.deterministic,
            num_warps=self.tiles.num_warps,
        )  # fmt: skip

    def _compact(self, x1: Tensor) -> None:
        compact_kernel[(1,)](x1, self._row, self._value, self._count, self.d_ff, SCAN_ROWS=SCAN, num_warps=4)

    def _down(self, out: Tensor) -> None:
        grid = (triton.cdiv(self.d_model, self.tiles.list_cols), self.tiles.split)
        down_kernel[grid](
            self._row, self._value, self._count, self.weights[2], self._part if self.deterministic else self._y,
            self.d_model,
            ROWS=self.tiles.list_rows, COLS=self.tiles.list_cols, SPLIT=self.tiles.split,
            STAGES=self.tiles.num_stages, ATOMIC=not self.deterministic, num_warps=self.tiles.num_warps,
        )  # fmt: skip
        if self.deterministic:
            reduce_kernel[(grid[0],)](
                self._part, out, self.d_model, SPLIT=self.tiles.split, COLS=self.tiles.list_cols, num_warps=4
            )
        else:
            out.copy_(self._y)

    def _rows(self, name: str, x: Tensor, width: int) -> Tensor:
        if x.ndim not in (1, 2) or x.shape[-1] != width or x.device != self.weights[0].device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} on {x.device}: expected [{width}] or [tokens, {width}] on "
                f"{self.weights[0].device}"
            )
        return x.contiguous()
