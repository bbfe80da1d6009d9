"""One case of the GPU benchmark: providers, a gate against float64, then times on cold weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.bench_gpu_timing import Device, Times, is_cold, measure, num_copies, percentile
from kernels.providers import DenseTorch, FFNWeights, Vectors, random_case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRICES_A_COPY = 4  # gate, up, down, and down as nn.Linear holds it, for dense torch


@dataclass(frozen=True)
class Row:
    """One kernel of one provider. ``p20_us`` to ``p80_us``: time on the device per call of ``num_tokens`` tokens.

    ``sparsity``: share of exact zeros in x1; ``live``: share of neurons that live for any of the tokens.
    ``eager_p50_us``, ``launch_p50_us``, ``synced_p50_us``: without a graph, see ``Times``. ``cold``: the weights could
    not come from the L2 cache. ``gbps``: 1e9 bytes/s of the weights that have to be read. ``rel_err``: norm of the
    error over norm of the float64 result; None if it is not finite or the live neurons are not those of the reference.
    Times are None where the gate failed.
    """

    kernel: str
    provider: str
    d_model: int
    d_ff: int
    num_tokens: int
    dtype: str
    sparsity: float
    live: float
    mask_source: str
    timer: str
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    eager_p50_us: float | None
    launch_p50_us: float | None
    synced_p50_us: float | None
    num_reps: int
    num_copies: int
    cold: bool
    gbps: float | None
    rel_err: float | None
    gate_passed: bool


class TritonProvider:
    """``TritonFFN`` behind the interface of ``kernels.providers``."""

    def __init__(self, weights: FFNWeights, threshold: float, *, deterministic: bool) -> None:
        from kernels.triton_ffn import TritonFFN

        self.kernels, self.threshold = TritonFFN(*weights.tensors, deterministic=deterministic), threshold

    def gate(self, v: Vectors) -> Tensor:
        """Not zero where the kernel keeps a neuron (x1 itself: the gate alone is not among its results)."""
        self.kernels.ffn(v.x, self.threshold)
        return self.kernels.x1(len(v.x))

    def s2(self, v: Vectors) -> Tensor:
        return self.kernels.s2(v.s, v.x)

    def s3(self, v: Vectors) -> Tensor:
        return self.kernels.s3(v.x1)

    def ffn(self, v: Vectors) -> Tensor:
        return self.kernels.ffn(v.x, self.threshold)


def make_providers(weights: FFNWeights, threshold: float) -> dict[str, Any]:
    """By name; all take vectors of the weights' dtype."""
    return {
        "torch": DenseTorch(weights, threshold),
        "triton": TritonProvider(weights, threshold, deterministic=False),
        "triton_deterministic": TritonProvider(weights, threshold, deterministic=True),
    }


def tolerance(provider: str, kernel: str, dtype: torch.dtype) -> float:
    """Sums are float32: 1e-5 of the norm, and what rounding to 16 bits costs: once in ffn, at every step in torch."""
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    if provider == "torch":
        return 1e-5 + 3 * rounding
    return 1e-5 + (rounding if kernel == "ffn" else 0.0)


def check(provider: Any, kernel: str, v: Vectors, wide: FFNWeights, threshold: float, allowed: float) -> float:
    """Relative error against float64, on the provider's own live set; inf if that is wrong by more than rounding."""
    with torch.no_grad():
        if kernel == "s2":
            truth = reference.s2(v.s, v.x, wide.w_up, accumulate=torch.float64)
        elif kernel == "s3":
            truth = reference.s3(v.x1, wide.w_down_t, accumulate=torch.float64)
        else:
            exact = v.x.double() @ wide.w_gate.T
            live = provider.gate(v) != 0
            flipped = live != reference.kept(exact, threshold)
            if bool(((exact - threshold).abs() > allowed * exact.abs().max())[flipped].any()):
                return math.inf
            truth = reference.ffn(v.x, *wide.tensors, live=live, accumulate=torch.float64)
        found = getattr(provider, kernel)(v).double()
        return float((found - truth).norm()) / (float(truth.norm()) or 1.0)


def bench_case(
    device: Device,
    where: str,
    *,
    d_model: int,
    d_ff: int,
    dtype: str,
    sparsity: float,
    num_tokens: int,
    rounds: int,
    memory_bytes: float,
    seed: int = 0,
    make: Callable[[FFNWeights, float], dict[str, Any]] = make_providers,
) -> list[Row]:
    """One shape at one sparsity, on torch device ``where``: gated, then timed. s2 and s3 for one token only."""
    made, x, threshold = random_case(d_model, d_ff, sparsity, DTYPES[dtype], seed, tokens=num_tokens)
    weights = FFNWeights(*(w.to(where) for w in made.tensors))
    x = x.to(where, DTYPES[dtype])
    s = reference.gate(x, weights.w_gate, threshold).to(DTYPES[dtype])
    x1 = reference.s2(s, x, weights.w_up).to(DTYPES[dtype])
    v = Vectors(x, s, x1)
    live = float((s != 0).any(0).double().mean())
    matrix = float(weights.w_gate.numel() * weights.w_gate.element_size())
    kernels = ("s2", "s3", "ffn") if num_tokens == 1 else ("ffn",)
    least = min(_weight_bytes(kernel, "triton", live, matrix) for kernel in kernels)
    copies = num_copies(least, MATRICES_A_COPY * matrix, device.l2_bytes, memory_bytes)
    layers = [weights] + [FFNWeights(*(w.clone() for w in weights.tensors)) for _ in range(copies - 1)]
    providers = [make(layer, threshold) for layer in layers]
    wide = FFNWeights(*(w.double() for w in weights.tensors))
    errors = {
        (kernel, name): check(
            provider, kernel, v, wide, threshold, tolerance(name, kernel, DTYPES[dtype])
        )
        for kernel in kernels
        for name, provider in providers[0].items()
    }  # fmt: skip
    del wide
    passed = {key: error <= tolerance(key[1], key[0], DTYPES[dtype]) for key, error in errors.items()}
    work = {
        (kernel, name): [partial(getattr(each[name], kernel), v) for each in providers]
        for (kernel, name), good in passed.items()
        if good
    }
    with torch.no_grad():
        times = measure(device, work, rounds) if work else {}
    zeros = float((x1 == 0).double().mean())
    rows = []
    for (kernel, name), error in errors.items():
        found = times.get((kernel, name), Times())
        num_bytes = _weight_bytes(kernel, name, live, matrix)
        p20, p50, p80 = (_or_none(percentile(found.graph, p)) for p in (20, 50, 80))
        eager, launch, synced = (_or_none(percentile(us, 50)) for us in (found.eager, found.launch, found.synced))
        rows.append(
            Row(
                kernel, name, d_model, d_ff, num_tokens, dtype, zeros, live, "random", "cuda_graph_events",
                p20, p50, p80, eager_p50_us=eager, launch_p50_us=launch, synced_p50_us=synced,
                num_reps=len(found.graph), num_copies=copies, cold=is_cold(copies, num_bytes, device.l2_bytes),
                gbps=num_bytes / (p50 * 1e3) if p50 else None, rel_err=error if math.isfinite(error) else None,
                gate_passed=passed[kernel, name],
            )
        )  # fmt: skip
    return rows


def _weight_bytes(kernel: str, provider: str, live: float, matrix: float) -> float:
    share = 1.0 if provider == "torch" else live
    return matrix * {"s2": share, "s3": share, "ffn": 1.0 + 2.0 * share}[kernel]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
