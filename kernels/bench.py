"""Correctness gate first, then timing, of the FFN's kernels on a model's own layers and inputs.

Weights are cold: before every measurement the last-level cache is swept, and within one every layer is visited once.
Providers take turns inside a round. One thread is timed by the CPU time of the process, several by the wall clock. A
provider that fails the gate is reported, without times.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels import cpu, reference
from kernels.measure import CacheSweep, ReadCeiling, clock, fits_cache, last_level_cache_bytes, torch_threads
from kernels.providers import (
    KERNELS,
    PROVIDERS,
    SPARSE,
    FFNWeights,
    Provider,
    Vectors,
    computes,
    make_providers,
    random_case,
)

__all__ = ["KERNELS", "FFNWeights", "Row", "bench_layers", "random_case"]

logger = logging.getLogger(__name__)

MASK_SOURCES = ("recorded", "random")
MAX_CALLS = 32  # of each layer, with inputs of their own; rounds walk through them
GATE_CALLS = 2  # of those, checked for each layer, kernel and provider
MIN_ROUNDS = 3
MAX_COPIES = 64


@dataclass(frozen=True)
class Row:
    """One kernel of one provider. Times are per call of ``num_tokens`` tokens, nan where the gate failed.

    ``sparsity``: share of exact zeros in x1 over the inputs used. ``live_frac``: neurons that live for some token of a
    call. ``gbps``: 1e9 bytes/s of what the provider has to read and write (weights once per call, dead rows not by the
    sparse one) at the median time. ``rel_err``: worst norm of the error over norm of the float64 reference.
    ``byte_ratio``: bytes a dense kernel moves over bytes this one moves; None for dense providers, and where
    ``byte_ratio_note`` says why it says nothing about time. ``weights_bytes``: of the weights that calls walk through;
    ``cache_bytes``: of the last-level cache. ``timer``: 'process_cpu' (one thread) or 'wall'.
    """

    kernel: str
    provider: str
    d_model: int
    d_ff: int
    num_tokens: int
    dtype: str
    sparsity: float
    live_frac: float
    mask_source: str
    threads: int
    timer: str
    p20_us: float
    p50_us: float
    p80_us: float
    num_reps: int
    gbps: float
    rel_err: float
    gate_passed: bool
    byte_ratio: float | None
    byte_ratio_note: str | None
    weights_bytes: int
    cache_bytes: int


@dataclass(eq=False)
class _Layer:
    """One layer, or a copy of it elsewhere in memory, with what runs on it."""

    weights: FFNWeights
    threshold: float
    providers: dict[str, Provider]
    calls: dict[torch.dtype, list[Vectors]]


@dataclass
class _Result:
    """One kernel of one provider: relative errors, one entry a checked call; microseconds per call, one a round."""

    tolerance: float
    errors: list[float] = field(default_factory=list)
    us: list[float] = field(default_factory=list)

    @property
    def rel_err(self) -> float:
        return float(np.max(self.errors)) if self.errors else math.nan  # nan if any is

    @property
    def gate_passed(self) -> bool:
        return self.rel_err <= self.tolerance


@dataclass(frozen=True)
class _Shares:
    """Of the inputs used: zeros in x1, and the neurons that live for at least one token of a call."""

    sparsity: float
    live: float


def bench_layers(
    layers: Sequence[FFNWeights],
    inputs: Sequence[Tensor],
    thresholds: Sequence[float],
    *,
    mask_source: str,
    kernels: Sequence[str] = KERNELS,
    threads: int = 1,
    num_tokens: int = 1,
    repeats: int = 30,
    budget_s: float = 60.0,
    progress: Callable[[float, float], None] | None = None,
    ceiling: ReadCeiling | None = None,
) -> list[Row]:
    """Checks, then times: one row for each of the ``kernels`` by each of torch, native_dense, native, and for one token
    a certified gate and ffn.

    ``inputs[i]`` is ``[tokens, D]``, inputs of layer i; calls take ``num_tokens`` of them at a time. ``mask_source``
    says where they (hence the masks) come from: 'recorded' from a model, or 'random'. There are at most ``repeats``
    rounds, and no new one after three once ``budget_s`` seconds have gone into timing. ``progress(done, total)``
    follows the rounds, and ``ceiling`` reads memory once in each. Where native kernels cannot be built their rows come
    without times, after a warning.
    ValueError on wrong shapes, dtypes or counts.
    """
    _check(layers, inputs, thresholds, mask_source, num_tokens, repeats, kernels)
    if not (found := cpu.available()):
        logger.warning("the native kernels are not measured: %s", found.why)
    with torch_threads(threads), torch.no_grad():
        dtype = layers[0].w_gate.dtype
        results = {
            (kernel, name): _Result(_tolerance(name, dtype))
            for kernel in kernels
            for name in PROVIDERS
            if computes(name, kernel, num_tokens)
        }
        names = {name for _, name in results}
        work, shares = _prepare(layers, inputs, thresholds, threads, num_tokens, names)
        for layer in work[: len(layers)]:
            _gate(layer, results)
        timer, now = clock(threads)
        _time(work, results, now, repeats, budget_s, progress, ceiling)
    rows = []
    weight = layers[0].w_gate
    weights_bytes = sum(w.nbytes for layer in work for w in layer.weights.tensors)
    in_cache = fits_cache(weights_bytes)
    for (kernel, provider), result in results.items():
        dense_bytes = _bytes(kernel, "torch", weight, 1.0, num_tokens)
        num_bytes = _bytes(kernel, provider, weight, shares.live, num_tokens) if provider in SPARSE else dense_bytes
        p20, p50, p80 = (float(np.percentile(result.us, p)) if result.us else math.nan for p in (20, 50, 80))
        rows.append(
            Row(
                kernel, provider, weight.shape[1], weight.shape[0], num_tokens,
                dtype=str(weight.dtype).removeprefix("torch."), sparsity=shares.sparsity,
                live_frac=shares.live, mask_source=mask_source,
                threads=threads, timer=timer, p20_us=p20, p50_us=p50, p80_us=p80, num_reps=len(result.us),
                gbps=num_bytes / (p50 * 1e3), rel_err=result.rel_err, gate_passed=result.gate_passed,
                byte_ratio=dense_bytes / num_bytes if provider in SPARSE and not in_cache else None,
                byte_ratio_note=in_cache if provider in SPARSE else None,
                weights_bytes=weights_bytes, cache_bytes=last_level_cache_bytes(),
            )
        )  # fmt: skip
    return rows


def _check(
    layers: Sequence[FFNWeights],
    inputs: Sequence[Tensor],
    thresholds: Sequence[float],
    mask_source: str,
    num_tokens: int,
    repeats: int,
    kernels: Sequence[str],
) -> None:
    if mask_source not in MASK_SOURCES:
        raise ValueError(f"mask_source is {mask_source!r}: one of {', '.join(MASK_SOURCES)}")
    if not layers or not len(layers) == len(inputs) == len(thresholds):
        raise ValueError(f"{len(layers)} layers, {len(inputs)} inputs, {len(thresholds)} thresholds: as many of each")
    if not kernels or not set(kernels) <= set(KERNELS):
        raise ValueError(f"kernels are {', '.join(kernels) or 'none'}: some of {', '.join(KERNELS)}")
    if num_tokens < 1 or repeats < 1:
        raise ValueError(f"num_tokens is {num_tokens} and repeats is {repeats}: both must be at least 1")
    shape, dtype = layers[0].w_gate.shape, layers[0].w_gate.dtype
    for i, (layer, x, threshold) in enumerate(zip(layers, inputs, thresholds, strict=True)):
        reference.check_threshold(threshold)
        for weight in layer.tensors:
            if weight.shape != shape or weight.dtype != dtype or dtype not in cpu.WEIGHT_DTYPES:
                raise ValueError(
                    f"layer {i} has weights of {tuple(weight.shape)} {weight.dtype}: every matrix must be "
                    f"{tuple(shape)} of one dtype, float32, bfloat16 or float16"
                )
        if x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] < num_tokens:
            raise ValueError(f"inputs[{i}] is {tuple(x.shape)}: expected [at least {num_tokens}, {shape[1]}]")


def _prepare(
    layers: Sequence[FFNWeights],
    inputs: Sequence[Tensor],
    thresholds: Sequence[float],
    threads: int,
    num_tokens: int,
    names: Collection[str],
) -> tuple[list[_Layer], _Shares]:
    """Every layer with its providers and calls; copied until the set is twice the last-level cache."""
    weight = layers[0].w_gate
    num_bytes = 3 * len(layers) * weight.numel() * weight.element_size()
    copies = min(MAX_COPIES, -(-2 * last_level_cache_bytes() // num_bytes))
    zeros, live, all_calls = [], [], []
    for layer, recorded, threshold in zip(layers, inputs, thresholds, strict=True):
        num_calls = min(recorded.shape[0] // num_tokens, MAX_CALLS)
        x = recorded[: num_calls * num_tokens].float().contiguous()
        s = reference.gate(x, layer.w_gate, threshold)
        x1 = reference.s2(s, x, layer.w_up)
        zeros.append(float((x1 == 0).double().mean()))
        live.append(float((s.view(num_calls, num_tokens, -1) != 0).any(1).double().mean()))
        parts = zip(x.split(num_tokens), s.split(num_tokens), x1.split(num_tokens), strict=True)
        calls = [Vectors(*part) for part in parts]
        all_calls.append({torch.float32: calls, weight.dtype: [v.to(weight.dtype) for v in calls]})
    work: list[_Layer] = []
    for copy in range(copies):
        for layer, threshold, by_dtype in zip(layers, thresholds, all_calls, strict=True):
            same = layer if copy == 0 else FFNWeights(*(w.clone() for w in layer.tensors))
            work.append(_Layer(same, threshold, make_providers(same, threshold, threads, names), by_dtype))
    return work, _Shares(float(np.mean(zeros)), float(np.mean(live)))


def _tolerance(provider: str, dtype: torch.dtype) -> float:
    """Sums are float32, so 1e-5 of the norm; torch in a 16-bit type also rounds every intermediate result."""
    return {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5) if provider == "torch" else 1e-5


def _gate(layer: _Layer, results: dict[tuple[str, str], _Result]) -> None:
    """Compares every kernel and provider of a layer with float64, on outputs poisoned with NaN."""
    wide = FFNWeights(*(w.double() for w in layer.weights.tensors))
    for (kernel, name), result in results.items():
        if name not in layer.providers:
            continue
        provider = layer.providers[name]
        for v in layer.calls[provider.dtype][:GATE_CALLS]:
            poisoned = torch.full_like(v.x1 if kernel in ("gate", "s2") else v.x, math.nan)
            found = getattr(provider, kernel)(v, poisoned).double()
            truth = _truth(kernel, provider, v, wide, layer.threshold, result.tolerance)
            error = math.inf if truth is None else float((found - truth).norm()) / (float(truth.norm()) or 1.0)
            result.errors.append(error)


def _truth(
    kernel: str, provider: Provider, v: Vectors, wide: FFNWeights, threshold: float, tolerance: float
) -> Tensor | None:
    """The float64 result on the provider's own live set; None if that is wrong by more than rounding explains.

    At a threshold above 0 the activation jumps, so a neuron whose gate lies within rounding of it may go either way.
    """
    if kernel == "s2":
        return reference.s2(v.s, v.x, wide.w_up, accumulate=torch.float64)
    if kernel == "s3":
        return reference.s3(v.x1, wide.w_down_t, accumulate=torch.float64)
    exact = v.x.double() @ wide.w_gate.T
    live = provider.gate(v) != 0
    flipped = live != reference.kept(exact, threshold)
    if bool(((exact - threshold).abs() > tolerance * exact.abs().max())[flipped].any()):
        return None
    if kernel == "gate":
        return torch.where(live, exact, torch.zeros_like(exact))
    return reference.ffn(v.x, *wide.tensors, live=live, accumulate=torch.float64)


def _time(
    work: Sequence[_Layer],
    results: dict[tuple[str, str], _Result],
    now: Callable[[], int],
    repeats: int,
    budget_s: float,
    progress: Callable[[float, float], None] | None,
    ceiling: ReadCeiling | None,
) -> None:
    sweep = CacheSweep()
    began = time.monotonic()
    for turn in range(repeats):
        for kernel in dict.fromkeys(kernel for kernel, _ in results):
            names = [name for k, name in results if k == kernel]
            first = turn % len(names)
            for provider in names[first:] + names[:first]:
                result = results[kernel, provider]
                if result.gate_passed:
                    calls = [_call(layer, kernel, provider, turn) for layer in work]
                    sweep()
                    start = now()
                    for function, vectors in calls:
                        function(vectors)
                    result.us.append((now() - start) / len(calls) / 1e3)
        if ceiling is not None:
            ceiling.probe()
        spent = time.monotonic() - began
        over = turn + 1 >= MIN_ROUNDS and spent >= budget_s
        if progress is not None:
            by_time = repeats * min(spent / max(budget_s, 1e-9), 0.99)
            progress(repeats if over else max(turn + 1.0, by_time), repeats)
        if over:
            return


def _call(layer: _Layer, kernel: str, provider: str, turn: int) -> tuple[Callable[[Vectors], Tensor], Vectors]:
    implementation = layer.providers[provider]
    calls = layer.calls[implementation.dtype]
    return getattr(implementation, kernel), calls[turn % len(calls)]


def _bytes(kernel: str, provider: str, weight: Tensor, live: float, num_tokens: int) -> float:
    """What one call has to move: the weights of live neurons once, each token's vectors as float32.

    Of the certified gate: its screen, a byte for each weight, and the live rows, which it cannot skip.
    """
    d_ff, d_model = weight.shape
    matrix = weight.numel() * weight.element_size()
    gate = 1.0 / weight.element_size() + live if provider == "certified" else 1.0
    matrices = {"gate": gate, "s2": live, "s3": live, "ffn": gate + 2.0 * live}[kernel]
    floats = {"gate": d_model + d_ff, "s2": d_model + 2 * d_ff, "s3": d_ff + d_model, "ffn": 2 * d_model}[kernel]
    return matrices * matrix + 4 * num_tokens * floats
