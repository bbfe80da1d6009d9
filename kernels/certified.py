"""The certified gate: an 8-bit screen skips gate rows that are provably dead, and the result stays exact to the bit.

For one token the gate row w of a neuron is first met as ``scale * q`` (q int8, ``[D]``), and x as ``step * p`` (p a
16-bit integer). Their product S = sum q p is an exact integer. With u = 2^-24, |.| the Euclidean length,
w^ = scale q and x^ = step p:

    sum w x           = scale step S  +  sum (w - w^) x  +  sum w^ (x - x^)
    |sum (w - w^) x|  <= |w - w^| |x|                                          (Cauchy-Schwarz)
    |sum w^ (x - x^)| <= |w^| |x - x^|,      |x - x^| <= 0.51 step sqrt(D)
    |gate - sum w x|  <= n u / (1 - n u) |w| |x|  +  underflow                 (Higham, Accuracy and Stability, 3.1)

where gate is the float32 value that our own kernel computes, and n the longest chain of roundings in it. So

    gate <= scale step S + spread |x| + norm |x - x^| + floor,       spread = |w - w^| + n u / (1 - n u) |w|

and a row for which that lies below the threshold (at most 0, for threshold 0) is dead. Only the others are computed, by
the very loop of the exact kernel. Rows and inputs so large, so small or so odd (infinite, NaN) that these lines would
not hold are never skipped. This file holds the readable twin (``quantise``, ``upper_bounds``) of ``cpu_screen.h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import NativeFFN

LARGEST_WEIGHTS = 2.0**60
"""Rows longer than this are always computed: below it, and |x| likewise limited, nothing overflows."""
MAX_D_MODEL = 1 << 16
"""The partial sums of S are int32."""
_ROUNDED_UP = 1 + 2.0**-20
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, eq=False)
class Int8Gate:
    """A gate in 8 bits and what bounds it: ``rows`` int8 ``[F, width]`` (padded with zeros), the rest ``[F]`` float32.

    ``scale`` of the row; ``spread`` and ``norm`` as above, rounded up, infinite for a row that must not be skipped;
    ``total``: the sum of the row, int32. ``largest_norm``: of the rows that may be skipped.
    """

    rows: Tensor
    scale: Tensor
    spread: Tensor
    norm: Tensor
    total: Tensor
    largest_norm: float

    def packed_bounds(self) -> Tensor:
        """``struct RowBound`` of cpu_plan.h for every row, as bytes ``[F, 16]``."""
        columns = [self.scale, self.spread, self.norm, self.total.view(torch.float32)]
        return torch.stack(columns, dim=1).view(torch.uint8)

    def floor(self, d_model: int) -> float:
        """What float32 may lose to underflow for |x| <= 1, in a process that flushes denormals as in one that does not.

        2^-126 for each of at most 4 D operations, and for each value of w and of x that may count as zero.
        """
        return 2.0**-125 * (4 * d_model + math.sqrt(d_model) * (1 + self.largest_norm))


def roundings(d_model: int) -> int:
    """The longest chain of float32 roundings in a dot product of our kernels, whatever their vectors.

    With vectors of L lanes: D / (2 L) + 2 multiply-adds in a lane, two roundings in one of them where it is not fused,
    one addition of the two accumulators, log2 L additions of the lanes. L is at least 4.
    """
    return -(-d_model // 8) + 8


def quantise(w_gate: Tensor, step: int = 1) -> Int8Gate:
    """The 8-bit gate of ``[F, D]`` weights, its rows padded to a multiple of ``step``. Computed in float64."""
    d_ff, d_model = w_gate.shape
    chain = roundings(d_model) * 2.0**-24
    slack = chain / (1 - chain) + 2.0**-40  # and the roundings of the bound itself, which is computed in double
    rows = torch.zeros(d_ff, -(-d_model // step) * step, dtype=torch.int8)
    scale, spread, norm, total = torch.zeros(d_ff), torch.zeros(d_ff), torch.zeros(d_ff), torch.zeros(d_ff).int()
    largest_norm = 0.0
    chunk = max(1, _CHUNK_VALUES // d_model)
    for part in (slice(i, min(i + chunk, d_ff)) for i in range(0, d_ff, chunk)):
        wide = w_gate[part].double()
        length = wide.norm(dim=1)
        certain = length <= LARGEST_WEIGHTS  # False for NaN
        size = wide.abs().amax(1)
        usable = certain & (size >= 1 / LARGEST_WEIGHTS)  # a row all but zero is represented by zero
        scale[part] = torch.where(usable, size / 127, torch.zeros_like(size)).float()
        factor = scale[part].double()[:, None]
        q = torch.where(usable[:, None], wide / factor, torch.zeros_like(wide)).round().clamp(-127, 127)
        rows[part, :d_model] = q.to(torch.int8)
        total[part] = q.sum(1).int()
        near = q * factor  # exact in double
        near_length = near.norm(dim=1)
        bound = (wide - near).norm(dim=1) + slack * torch.maximum(length, near_length)
        spread[part] = _up(torch.where(certain, bound, torch.full_like(bound, math.inf)))
        norm[part] = _up(near_length)
        largest_norm = max(largest_norm, float(torch.where(certain, length, torch.zeros_like(length)).max()))
    return Int8Gate(rows, scale, spread, norm, total, largest_norm)


def _up(value: Tensor) -> Tensor:
    """The float32 not below a float64, with room for the roundings of norms."""
    return torch.nextafter((value * _ROUNDED_UP).float(), torch.tensor(math.inf))


def upper_bounds(gate: Int8Gate, x: Tensor) -> Tensor:
    """What no float32 gate of x ``[D]`` exceeds, ``[F]`` float64: the readable twin of ``may_live`` in cpu_screen.h.

    Infinite where nothing can be said.
    """
    d_model = x.shape[0]
    wide = x.double()
    size, root = float(wide.abs().max()), math.sqrt(d_model)
    length = (float(wide.norm()) + root * 2.0**-126) * _ROUNDED_UP
    if not (size >= 1 / LARGEST_WEIGHTS and length <= LARGEST_WEIGHTS):
        return torch.full((gate.rows.shape[0],), math.inf, dtype=torch.float64)
    step = size / 32767
    p = (x * torch.tensor(32767 / size)).round().clamp(-32768, 32767).long()
    product = (gate.rows[:, :d_model].long() * p).sum(1).double()
    slack = gate.spread.double() * length + gate.norm.double() * (0.51 * step * root)
    return product * (gate.scale.double() * step) + slack + gate.floor(d_model) * (1 + length)


class CertifiedFFN(NativeFFN):
    """``NativeFFN`` with a screened gate: same arguments, same bits, a quarter of the gate's bytes (float32) more.

    ``gate`` and ``ffn`` of one token are screened. Several tokens share one reading of the gate and are not: few rows
    are dead for all of them. A screen that lets most rows through is given up within the call. ``num_exact`` is the
    number of gates that the last call of one token computed exactly.

    An edit of ``w_gate`` in place is seen as torch sees it (not through ``.data`` or numpy) and screened anew at the
    next call. ValueError for ``d_model`` above 65536, else as NativeFFN.
    """

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, num_threads: int = 1, *, skip_dead: bool = True
    ) -> None:
        super().__init__(w_gate, w_up, w_down_t, num_threads, skip_dead=skip_dead)
        if self.d_model > MAX_D_MODEL:
            raise ValueError(f"d_model is {self.d_model}: the certified gate takes at most {MAX_D_MODEL}")
        self._quantise()

    @property
    def num_exact(self) -> int:
        """Gates computed exactly in the last call of one token, of ``d_ff``."""
        return int(self._lists[2][self.num_threads :].sum())

    def gate(self, x: Tensor, threshold: float = 0.0, out: Tensor | None = None) -> Tensor:
        """As ``NativeFFN.gate``, to the bit."""
        self._quantise()
        return super().gate(x, threshold, out)

    def ffn(self, x: Tensor, threshold: float = 0.0, out: Tensor | None = None) -> Tensor:
        """As ``NativeFFN.ffn``, to the bit."""
        self._quantise()
        return super().ffn(x, threshold, out)

    def _quantise(self) -> None:
        """Unless it is done and the weights are the same."""
        w_gate = self.weights[0]
        version = 0 if w_gate.is_inference() else w_gate._version
        if version == self.__dict__.get("_version"):
            return
        self._version = version
        self.screen = quantise(w_gate, self._library.screen_step)
        width = self.screen.rows.shape[1]
        self._screen_memory = (self.screen.packed_bounds(), torch.empty(2, width, dtype=torch.uint8))
        plan = self._plan.contents
        plan.screen, plan.screen_width = self.screen.rows.data_ptr(), width
        plan.bounds, plan.screen_x = (memory.data_ptr() for memory in self._screen_memory)
        plan.screen_floor = self.screen.floor(self.d_model)
