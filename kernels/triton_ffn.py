"""The sparse gated FFN on the GPU, in Triton: one to eight tokens at a time, any shape.

Layouts and meaning are those of ``kernels/reference.py``: three ``[F, D]`` matrices in float32, bfloat16 or float16,
sums in float32. The exact FFN is a clear, two launches and a cast: K1 reads the whole gate, reads ``w_up`` on the live
rows alone and appends them to a list; K2 splits that list over the grid and adds rows of ``w_down_t`` into y. Several
tokens share one pass over the neurons that live for any of them.

The number of live rows stays on the device and every buffer has a fixed size: nothing waits for the host, so the FFN
can be captured in a CUDA graph. When more rows live than the list has room for, K2 reads x1 and ``w_down_t`` in row
order instead, as a dense kernel does: at that density a list has nothing to save.

Atomics make the order of that list, and so the rounding of y, vary from run to run. ``deterministic=True`` takes two
more launches instead: a list in row order, and partial sums added in a fixed order.

Under ``TRITON_INTERPRET=1`` (set before this module is imported) everything runs on the CPU, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.reference import check_threshold
from kernels.triton_batch import down_batch_kernel, gate_up_batch_kernel
from kernels.triton_kernels import compact_kernel, down_kernel, gate_up_kernel, reduce_kernel, s2_kernel

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 8  # of one launch; the union of live neurons of more tokens is most of them
HEADER = 4  # floats before y in the scratch that one clear sets to zero: y stays 16-byte aligned


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


ONE_TOKEN = Tiles()
# Several tokens, by dot_precision: tensor cores want 16 rows a warp and depth 16; wider tiles spill in tf32x3.
BATCH = {
    "tf32": Tiles(rows=32, cols=64, list_rows=16, list_cols=128, num_stages=4),
    "tf32x3": Tiles(rows=32, cols=32, list_rows=16, list_cols=128, num_stages=4),
}
SCAN = 512  # neurons that one program of compact_kernel lists
BEFORE = 4096  # values that it looks at per step while it counts what lies before them


def dot_precision(weight: torch.dtype, x: torch.dtype) -> str:
    """How the tensor cores multiply: tf32 holds bfloat16 and float16 exactly, float32 takes three products."""
    return "tf32" if {weight, x} <= {torch.bfloat16, torch.float16} else "tf32x3"


def interpreted() -> bool:
    """Whether this module's kernels run in the interpreter, on the CPU (decided when it was imported)."""
    return not isinstance(gate_up_kernel, triton.runtime.JITFunction)


class TritonFFN:
    """One gated FFN on a CUDA device (or on the CPU under the interpreter).

    Weights are contiguous ``[F, D]`` of one dtype and device; ``x`` is ``[D]`` or ``[tokens, D]`` of any float dtype
    on that device. ``ffn`` takes up to eight tokens together, ``s2`` and ``s3`` (the paper's operators, for comparison)
    one after another. Results are float32 for s2 and s3, the dtype of ``x`` for ffn. ``capacity`` is the number of
    neurons the list has room for (default: half of F); ffn and s3 are exact beyond it too, reading ``w_down_t`` in row
    order. Scratch memory is allocated once and of fixed size: use one object per stream. Raises ValueError on a wrong
    argument.
    """

    def __init__(
        self,
        w_gate: Tensor,
        w_up: Tensor,
        w_down_t: Tensor,
        *,
        deterministic: bool = False,
        capacity: int | None = None,
        tiles: Tiles = ONE_TOKEN,
        batch_tiles: Tiles | None = None,
    ) -> None:
        for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
            if weight.ndim != 2 or weight.shape != w_gate.shape or 0 in weight.shape or not weight.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(weight.shape)}, contiguous={weight.is_contiguous()}: "
                    f"expected contiguous [F, D] = {tuple(w_gate.shape)} (down transposed)"
                )
            if weight.dtype not in WEIGHT_DTYPES or (weight.dtype, weight.device) != (w_gate.dtype, w_gate.device):
                raise ValueError(f"{name} is {weight.dtype} on {weight.device}: one of {WEIGHT_DTYPES}, all the same")
        self.weights, self.deterministic = (w_gate, w_up, w_down_t), deterministic
        self.d_ff, self.d_model = (int(n) for n in w_gate.shape)
        self.capacity = (self.d_ff + 1) // 2 if capacity is None else capacity
        if not 1 <= self.capacity <= self.d_ff:
            raise ValueError(f"capacity is {capacity}: it must be from 1 to F = {self.d_ff}")
        self.tiles, self.batch_tiles = tiles, BATCH if batch_tiles is None else dict.fromkeys(BATCH, batch_tiles)
        splits = {tiles.split, *(shape.split for shape in self.batch_tiles.values())}
        if any(triton.next_power_of_2(split) != split for split in splits):
            raise ValueError(f"split is {splits}: it must be a power of two")
        device, width = w_gate.device, MAX_TOKENS * self.d_model
        parts = MAX_TOKENS * max(splits) if deterministic else 0
        self._row = torch.empty(self.capacity, dtype=torch.int32, device=device)
        self._value = torch.empty(self.capacity * MAX_TOKENS, device=device)
        self._x1 = torch.empty(self.d_ff * MAX_TOKENS, device=device)
        self._part = torch.empty(parts * self.d_model, device=device)
        self._count_and_y = torch.empty(HEADER + width, device=device)
        self._count, self._y = self._count_and_y[:1].view(torch.int32), self._count_and_y[HEADER:]

    @property
    def num_live(self) -> int:
        """Neurons that lived in the last launch of ``ffn`` (for any of its tokens) or ``s3``. Waits for the device."""
        return int(self._count)

    @property
    def overflowed(self) -> bool:
        """Whether that launch had more live neurons than the list has room for. Waits for the device."""
        return self.num_live > self.capacity

    def x1(self, num_tokens: int) -> Tensor:
        """x1 ``[num_tokens, F]`` of the last launch of ``ffn``, of that many tokens: a view, soon overwritten."""
        width = 1 if num_tokens == 1 else MAX_TOKENS
        return self._x1[: self.d_ff * width].view(self.d_ff, width).t()[:num_tokens]

    def s2(self, s: Tensor, x: Tensor) -> Tensor:
        """``x1 [..., F] = s * (x w_up^T)``, float32; rows of ``w_up`` whose ``s`` is 0 are not read."""
        x, s = self._rows("x", x, self.d_model), self._rows("s", s, self.d_ff)
        x1 = torch.empty(s.shape, device=s.device)
        if x.shape[:-1] != s.shape[:-1]:
            raise ValueError(f"x is {tuple(x.shape)} and s is {tuple(s.shape)}: they must hold the same tokens")
        shape, grid = _wide(self.tiles), (triton.cdiv(self.d_ff, self.tiles.rows),)
        tokens = x.view(-1, self.d_model)
        for token, s_token, out in zip(tokens, s.view(-1, self.d_ff), x1.view(-1, self.d_ff), strict=True):
            s2_kernel[grid](s_token, token, self.weights[1], out, self.d_ff, self.d_model, **shape)
        return x1

    def s3(self, x1: Tensor) -> Tensor:
        """``y [..., D] = x1 w_down_t``, float32; rows of ``w_down_t`` whose ``x1`` is 0 are not read."""
        x1 = self._rows("x1", x1, self.d_ff)
        y = torch.empty(*x1.shape[:-1], self.d_model, device=x1.device)
        for token, out in zip(x1.view(-1, self.d_ff), y.view(-1, self.d_model), strict=True):
            self._count_and_y[: HEADER + self.d_model].zero_()
            self._compact(token, 1)
            self._down(token, out.view(1, -1))
        return y

    def ffn(self, x: Tensor, threshold: float = 0.0) -> Tensor:
        """``y [..., D]``, exact: gate on every row, up and down on the live rows alone. The dtype of ``x``."""
        x, threshold = self._rows("x", x, self.d_model), check_threshold(threshold)
        y = torch.empty_like(x)
        groups = zip(
            x.view(-1, self.d_model).split(MAX_TOKENS), y.view(-1, self.d_model).split(MAX_TOKENS), strict=True
        )
        for tokens, out in groups:
            self._count_and_y[: HEADER + out.numel()].zero_()
            self._gate_up(tokens, threshold)
            if self.deterministic:
                self._compact(self._x1, 1 if len(tokens) == 1 else MAX_TOKENS)
            self._down(self._x1, out)
        return y

    def _gate_up(self, tokens: Tensor, threshold: float) -> None:
        w_gate, w_up, _ = self.weights
        found = (self._row, self._value, self._count, self._x1)
        append = not self.deterministic
        if len(tokens) == 1:
            gate_up_kernel[(triton.cdiv(self.d_ff, self.tiles.rows),)](
                tokens, w_gate, w_up, *found, self.d_ff, self.d_model, self.capacity, threshold,
                APPEND=append, **_wide(self.tiles),
            )  # fmt: skip
        else:
            precision = dot_precision(w_gate.dtype, tokens.dtype)
            tiles = self.batch_tiles[precision]
            gate_up_batch_kernel[(triton.cdiv(self.d_ff, tiles.rows),)](
                tokens, w_gate, w_up, *found, len(tokens), self.d_ff, self.d_model, self.capacity, threshold,
                APPEND=append, TOKENS=MAX_TOKENS, PRECISION=precision, **_wide(tiles),
            )  # fmt: skip

    def _compact(self, x1: Tensor, tokens: int) -> None:
        compact_kernel[(triton.cdiv(self.d_ff, SCAN),)](
            x1, self._row, self._value, self._count, self.d_ff, self.capacity,
            SCAN_ROWS=SCAN, BEFORE_ROWS=BEFORE // tokens, TOKENS=tokens, num_warps=4,
        )  # fmt: skip

    def _down(self, x1: Tensor, out: Tensor) -> None:
        """``out [tokens, D]`` from the list, or from ``x1`` if it overflowed."""
        num_tokens = len(out)
        tiles = self.tiles if num_tokens == 1 else self.batch_tiles["tf32x3"]
        grid = (triton.cdiv(self.d_model, tiles.list_cols), tiles.split)
        found = (self._row, self._value, self._count, x1, self.weights[2])
        target = self._part if self.deterministic else self._y
        shape: dict[str, Any] = {
            "ROWS": tiles.list_rows, "COLS": tiles.list_cols, "SPLIT": tiles.split, "STAGES": tiles.num_stages,
            "ATOMIC": not self.deterministic, "num_warps": tiles.num_warps,
        }  # fmt: skip
        if num_tokens == 1:
            down_kernel[grid](*found, target, self.d_ff, self.d_model, self.capacity, **shape)
        else:
            down_batch_kernel[grid](
                *found, target, num_tokens, self.d_ff, self.d_model, self.capacity, TOKENS=MAX_TOKENS, **shape
            )
        if self.deterministic:
            reduce_kernel[(triton.cdiv(out.numel(), tiles.list_cols),)](
                self._part, out, out.numel(), SPLIT=tiles.split, COLS=tiles.list_cols, num_warps=4
            )
        else:
            out.copy_(self._y[: out.numel()].view(out.shape))

    def _rows(self, name: str, x: Tensor, width: int) -> Tensor:
        if x.ndim not in (1, 2) or x.shape[-1] != width or x.device != self.weights[0].device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} on {x.device}: expected [{width}] or [tokens, {width}] on "
                f"{self.weights[0].device}"
            )
        return x.contiguous()


def _wide(tiles: Tiles) -> dict[str, Any]:
    return {"ROWS": tiles.rows, "COLS": tiles.cols, "STAGES": tiles.num_stages, "num_warps": tiles.num_warps}
