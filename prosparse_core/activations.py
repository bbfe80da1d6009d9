"""The activations of the method, one definition of each.

Paper (arXiv 2402.13516): ReLU section 3.1; Shifted ReLU and FATReLU (eq. 3) section 3.3.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn


class ReLU(nn.Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class ShiftedReLU(nn.Module):
    """max(x - shift, 0)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.shift)

    def extra_repr(self) -> str:
        return f"shift={self.shift}"


class FATReLU(nn.Module):
    """x where x >= threshold, else 0 (paper eq. 3; the boundary is kept, as in the released models).

    ``threshold`` 0 is ReLU. As in any comparison with a number, x decides the precision: in bfloat16 the threshold is
    the nearest bfloat16.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"threshold={threshold}: FATReLU needs a threshold of at least 0")
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == 0:
            return torch.relu(x)
        # One pass over x, three times as fast as a comparison and a choice; torch's own threshold is a strict one.
        return nn.functional.threshold(x, _below(self.threshold, x.dtype), 0.0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


@functools.cache
def _below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a precision that is less than the threshold in that precision."""
    return float(torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))
