"""Who computes a kernel in a benchmark: dense torch, our own dense kernels, our sparse ones, and the sparse ones with a
screened gate. One interface for all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.certified import MAX_D_MODEL, CertifiedFFN

PROVIDERS = ("torch", "native_dense", "native", "certified")
SPARSE = ("native", "certified")
KERNELS = ("gate", "s2", "s3", "ffn")


def computes(provider: str, kernel: str, num_tokens: int) -> bool:
    """Whether a provider has a way of its own for this: a certified gate is for one token, and S2 and S3 need none."""
    return provider != "certified" or (kernel in ("gate", "ffn") and num_tokens == 1)


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """One gated FFN: contiguous ``[F, D]`` each (down transposed), of one of ``cpu.WEIGHT_DTYPES``, on the CPU."""

    w_gate: Tensor
    w_up: Tensor
    w_down_t: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w_gate, self.w_up, self.w_down_t


@dataclass(frozen=True, eq=False)
class Vectors:
    """The inputs of one call: x ``[tokens, D]``, s and x1 ``[tokens, F]``; the same numbers for every provider."""

    x: Tensor
    s: Tensor
    x1: Tensor

    def to(self, dtype: torch.dtype) -> Vectors:
        return Vectors(self.x.to(dtype), self.s.to(dtype), self.x1.to(dtype))


class Provider(Protocol):
    """The four kernels. ``dtype`` is that of the vectors it takes; ``out`` may be ignored."""

    dtype: torch.dtype

    def gate(self, v: Vectors, out: Tensor | None = None) -> Tensor: ...
    def s2(self, v: Vectors, out: Tensor | None = None) -> Tensor: ...
    def s3(self, v: Vectors, out: Tensor | None = None) -> Tensor: ...
    def ffn(self, v: Vectors, out: Tensor | None = None) -> Tensor: ...


class DenseTorch:
    """Dense torch as a model runs it: nn.Linear's layouts, every result in the weights' dtype."""

    def __init__(self, weights: FFNWeights, threshold: float) -> None:
        self.w_gate, self.w_up, self.threshold = weights.w_gate, weights.w_up, threshold
        self.w_down = weights.w_down_t.t().contiguous()
        self.dtype = weights.w_gate.dtype

    def gate(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        gate = F.linear(v.x, self.w_gate)
        return F.relu(gate) if self.threshold == 0.0 else torch.where(gate >= self.threshold, gate, 0.0)

    def s2(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return v.s * F.linear(v.x, self.w_up)

    def s3(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return F.linear(v.x1, self.w_down)

    def ffn(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return F.linear(self.gate(v) * F.linear(v.x, self.w_up), self.w_down)


class Native:
    """Our own kernels: sparse ones, our own dense baseline, or those with a certified gate."""

    dtype = torch.float32

    def __init__(self, kernels: cpu.NativeFFN, threshold: float) -> None:
        self.kernels, self.threshold = kernels, threshold

    def gate(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return self.kernels.gate(v.x, self.threshold, out)

    def s2(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return self.kernels.s2(v.s, v.x, out)

    def s3(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return self.kernels.s3(v.x1, out)

    def ffn(self, v: Vectors, out: Tensor | None = None) -> Tensor:
        return self.kernels.ffn(v.x, self.threshold, out)


def make_providers(
    weights: FFNWeights, threshold: float, threads: int, names: Collection[str] = PROVIDERS
) -> dict[str, Provider]:
    """Those of the ``names`` that this machine and these weights can have."""
    of, made = weights.tensors, dict[str, Provider]()
    if "torch" in names:
        made["torch"] = DenseTorch(weights, threshold)
    if not cpu.available():
        return made
    if "native_dense" in names:
        made["native_dense"] = Native(cpu.NativeFFN(*of, threads, skip_dead=False), threshold)
    if "native" in names:
        made["native"] = Native(cpu.NativeFFN(*of, threads), threshold)
    if "certified" in names and weights.w_gate.shape[1] <= MAX_D_MODEL:
        made["certified"] = Native(CertifiedFFN(*of, threads), threshold)
    return made


def random_case(
    d_model: int, d_ff: int, sparsity: float, dtype: torch.dtype, seed: int = 0, *, tokens: int = 8
) -> tuple[FFNWeights, Tensor, float]:
    """A synthetic layer, its inputs ``[tokens, D]`` and the threshold that kills that share of its neurons.

    The share is met over all tokens together, single tokens scatter around it. Every gate is positive, so any share
    from 0 to 1 can be cut by a threshold, and the threshold lies midway between two gates. What lifts the gates is
    spread over all of a row: in one weight it would be an outlier that no trained row has, and ruin an 8-bit scale.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=generator).abs()
    w_gate, w_up, w_down_t = (torch.randn(d_ff, d_model, generator=generator) / d_model**0.5 for _ in range(3))
    lift = (-(x @ w_gate.T).amin(1) / x.sum(1)).max()
    w_gate += lift.clamp_min(0.0) + 1.0 / d_model
    weights = FFNWeights(w_gate.to(dtype), w_up.to(dtype), w_down_t.to(dtype))
    return weights, x, threshold_for(x, weights.w_gate, sparsity)


def threshold_for(x: Tensor, w_gate: Tensor, sparsity: float) -> float:
    """The threshold that kills that share of the gates of all tokens together, midway between two gates.

    The gates must all be positive for a share that small to be cut.
    """
    gates = (x.double() @ w_gate.double().T).flatten().sort().values
    num_dead = round(sparsity * gates.numel())
    if num_dead == 0:
        return float(gates[0]) / 2
    if num_dead == gates.numel():
        return float(gates[-1]) * 2
    return float(gates[num_dead - 1] + gates[num_dead]) / 2
