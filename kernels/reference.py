"""The readable truth of the sparse gated FFN, in torch. Every fast kernel is compared with this file.

``g = x w_gate^T``, ``s = g`` where the neuron is kept and 0 elsewhere, ``x1 = s * (x w_up^T)`` (S2),
``y = x1 w_down_t`` (S3). The three matrices are all ``[F, D]``: down is stored transposed, so that a dead neuron is one
row of it. ``x`` is ``[..., D]``. Source: arXiv 2402.13516: equation 3 (FATReLU), and the steps (2) and (3) of its
sparse operators.

Everything is computed and returned in ``accumulate`` (float32, or float64 for a reference whose own rounding does not
matter), whatever the inputs are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_threshold(threshold: float) -> float:
    """The threshold as a float. ValueError if it is negative, infinite or not a number."""
    value = float(threshold)
    if not math.isfinite(value) or value < 0.0:
        raise ValueError(f"threshold is {threshold!r}: it must be 0 (ReLU) or a positive finite number (FATReLU)")
    return value


def kept(gate: Tensor, threshold: float) -> Tensor:
    """Which neurons live (bool, the shape of ``gate``): ``gate >= threshold``, for threshold 0 ``gate > 0`` (ReLU).

    A neuron whose gate is not a number is not kept.
    """
    return torch.ge(gate, threshold) if check_threshold(threshold) > 0.0 else torch.gt(gate, 0.0)


def gate(x: Tensor, w_gate: Tensor, threshold: float = 0.0, *, accumulate: torch.dtype = torch.float32) -> Tensor:
    """``s`` ``[..., F]``: the gate's value where it is kept, 0 elsewhere."""
    g = x.to(accumulate) @ w_gate.to(accumulate).T
    return torch.where(kept(g, threshold), g, torch.zeros_like(g))


def s2(s: Tensor, x: Tensor, w_up: Tensor, *, accumulate: torch.dtype = torch.float32) -> Tensor:
    """``x1`` ``[..., F]`` = ``s * (x w_up^T)``; exactly 0 where ``s`` is 0, whatever ``w_up`` and ``x`` hold there."""
    wide = s.to(accumulate)
    up = x.to(accumulate) @ w_up.to(accumulate).T
    return torch.where(wide != 0, wide * up, torch.zeros_like(up))


def s3(x1: Tensor, w_down_t: Tensor, *, accumulate: torch.dtype = torch.float32) -> Tensor:
    """``y`` ``[..., D]`` = ``x1 w_down_t``. (A row of zeros times infinity is not a number here; kernels skip it.)"""
    return x1.to(accumulate) @ w_down_t.to(accumulate)


def ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: float = 0.0,
    *,
    live: Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """The whole FFN, ``[..., D]``.

    ``live`` (bool ``[..., F]``) fixes which neurons are kept instead of the threshold. At a threshold above 0 the
    activation jumps there, so two correct kernels may differ by a whole neuron whose gate lies within rounding of it:
    compare a kernel with the reference on the kernel's own live set.
    """
    if live is None:
        s = gate(x, w_gate, threshold, accumulate=accumulate)
    else:
        g = x.to(accumulate) @ w_gate.to(accumulate).T
        s = torch.where(live, g, torch.zeros_like(g))
    return s3(s2(s, x, w_up, accumulate=accumulate), w_down_t, accumulate=accumulate)
