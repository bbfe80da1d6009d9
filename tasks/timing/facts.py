"""What the speed step says of its measurements: facts for the ledger, the figures of its meta, and why one is None."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tasks.step import Run, Work, provenance
from tasks.timing.decode import RAISED, RECORDED, Way
from tasks.timing.sparse_decode import Decoding

if TYPE_CHECKING:
    from torch import nn

    from kernels.bench import Row
    from prosparse_core.variants import Variant

KERNELS = ("s2", "s3", "ffn")
Report = Callable[[float, float], None]


class Reporter:
    """Turns measurements into facts, progress and the meta of the step."""

    def __init__(self, work: Work, run: Run, variant: Variant | None, no_native: str | None) -> None:
        machine = provenance()
        self._work, self._no_native = work, no_native
        self._facts: list[dict[str, Any]] = []
        self._ceiling = None if no_native else read_ceiling(run.recipe.speed.threads)
        name = None if variant is None else variant.id
        self._columns = {"variant": name, "cpu": machine["cpu"], "host": machine["host"], "device": "cpu"}
        self._threads = run.recipe.speed.threads
        self._speedup: dict[str, float | None] = dict.fromkeys((*KERNELS, "decode"))
        self._over_own_dense: dict[str, float | None] = dict.fromkeys(KERNELS)
        self._limit: dict[str, float | None] = dict.fromkeys((*KERNELS, "decode"))
        self._certified: float | None = None
        self._batches: dict[str, float | None] = {}
        self._decode: list[dict[str, Any]] = []
        self._reasons: dict[str, str] = {}
        self._failed: list[str] = []
        self._sparsity = math.nan
        self._implementation = "dense" if no_native else "native"
        if variant is not None:
            work.fact("variants", **variant.fact(run.recipe.model.id))
        if no_native:
            work.progress.note(f"{no_native}; only dense torch is timed")

    def part(self, phase: str, start: float, share: float) -> Report:
        def report(done: float, total: float) -> None:
            self._work.progress.update(start + share * min(1.0, done / total), 1.0, phase=phase)

        return report

    def kernels(self, rows: Sequence[Row], *, decides: bool = True, is_synthetic: bool = False) -> None:
        """One fact per row.

        Args:
            decides: these rows are what meta says of the kernels, of one token or of several.
            is_synthetic: nothing of the variant was used but, perhaps, its shape.
        """
        found = {(row.kernel, row.provider): row for row in rows}
        for row in rows:
            missing = row.provider != "torch" and self._no_native
            note = missing or (None if row.gate_passed else "failed the correctness gate")
            if note and not missing:
                self._failed.append(
                    f"{row.kernel} of {row.provider} ({row.mask_source} masks, {row.num_tokens} at once)"
                )
            columns = {**asdict(row), **self._columns}
            if is_synthetic:
                columns["variant"] = None
            self._facts.append({**_finite(columns), "cache": "cold", "note": note})
        if not decides:
            return
        if rows[0].num_tokens > 1:
            self._batches[str(rows[0].num_tokens)] = _ratio(found["ffn", "torch"], found["ffn", "native"])
            return
        self._sparsity = rows[0].sparsity
        self._certified = _ratio(found["ffn", "torch"], found["ffn", "certified"])
        for kernel in KERNELS:
            native = found[kernel, "native"]
            self._limit[kernel] = _number(native.byte_ratio)
            self._speedup[kernel] = _ratio(found[kernel, "torch"], native)
            self._over_own_dense[kernel] = _ratio(found[kernel, "native_dense"], native)
            if self._speedup[kernel] is None:
                self._reasons[kernel] = self._no_native or "failed the correctness gate, or was not timed"

    def ways(self, model: nn.Module, ways: Sequence[Way], raised: str | None, original: str | None) -> None:
        """One fact for each way to decode; those of recorded masks in float32 decide the speed-up and its limit.

        Args:
            raised: what was done to the thresholds of the ways with mask source ``raised``.
            original: the variant that the ways without masks decode.
        """
        config: Any = model.config
        dense = {(w.dtype, w.mask_source): w for w in ways if w.provider == "native_dense"}
        timer = "process_cpu" if self._threads == 1 else "wall"
        for way in ways:
            own = dense[way.dtype, way.mask_source]
            # What a mask lets live is one number for all ways of computing it, so that they can be compared.
            sparsity = None if way.mask_source is None else 1.0 - statistics.fmean(own.live)
            times = _quantiles_us([] if way.problem else way.seconds)
            num_bytes = statistics.fmean(way.bytes_read or own.bytes_read)
            gbps = None if times["p50_us"] is None else num_bytes / (1e3 * times["p50_us"])
            notes = [way.problem or way.note, raised if way.mask_source == RAISED else None]
            fact = {
                "kernel": "decode",
                "provider": way.provider,
                "d_model": config.hidden_size,
                "d_ff": config.intermediate_size,
                "num_tokens": 1,
                "dtype": way.dtype,
                "sparsity": 0.0 if sparsity is None else sparsity,
                "mask_source": way.mask_source,
                "threads": self._threads,
                "timer": timer,
                **times,
                "gbps": gbps,
                "live_frac": statistics.fmean(way.live) if way.live else 1.0,
                "rel_err": _number(way.rel_err),
                "gate_passed": way.problem is None,
                "byte_ratio": None
                if way.provider.endswith("_dense")
                else statistics.fmean(own.bytes_read) / num_bytes,
                "cutoff": way.cutoff,
                "note": "; ".join(n for n in notes if n) or None,
                **self._columns,
            }
            if way.mask_source is None:
                fact.update(variant=original, byte_ratio=None)
            if way.problem:
                self._failed.append(f"decode, {way.provider} of {way.dtype} ({way.mask_source} masks): {way.problem}")
            self._facts.append(fact)
            self._decode.append(self._summary(way, fact, own, ways))
        exact = next((d for d in self._decode if _is(d, "native_exact", "float32", RECORDED)), None)
        if exact is None:
            self._reasons["decode"] = "the activation has no exact zeros"
        elif exact["over_own_dense"] is None:
            self._reasons["decode"] = "failed the correctness gate"
        else:
            self._speedup["decode"], self._limit["decode"] = exact["over_own_dense"], exact["limit"]

    @staticmethod
    def _summary(way: Way, fact: Mapping[str, Any], own: Way, ways: Sequence[Way]) -> dict[str, Any]:
        """What meta keeps of a way: milliseconds of one token, and how much faster it is than what reads everything."""
        transformers = next(
            (w for w in ways if w.provider == "transformers_dense" and w.mask_source == way.mask_source), None
        )

        def over(baseline: Way | None) -> float | None:
            if baseline is None or baseline is way or baseline.problem or way.problem:
                return None
            return statistics.median(baseline.seconds) / statistics.median(way.seconds)

        kept = ("provider", "dtype", "mask_source", "cutoff", "sparsity", "live_frac", "gbps")
        return {
            **{name: fact[name] for name in kept},
            "ms": None if fact["p50_us"] is None else fact["p50_us"] / 1e3,
            "over_own_dense": over(own),
            "over_transformers": over(transformers) if way.dtype == "float32" else None,
            "limit": fact["byte_ratio"],
            "note": fact["note"],
        }

    def missing(self, provider: str, dtype: str, variant: str | None, why: str) -> None:
        """What was to be timed and could not be."""
        self._facts.append(
            {
                **self._columns,
                "variant": variant,
                "kernel": "decode",
                "provider": provider,
                "num_tokens": 1,
                "dtype": dtype,
                "threads": self._threads,
                "timer": "process_cpu" if self._threads == 1 else "wall",
                "note": f"n/a: {why}",
            }
        )

    def no_kernels(self, why: str) -> None:
        """There is nothing to skip in this model."""
        for kernel in KERNELS:
            self._reasons[kernel] = why
        self._work.progress.note(f"no sparse kernels: {why}")

    def nothing(self, obstacle: str, sparsity: float) -> None:
        """No kernel computes such an FFN: every speed-up is n/a for this reason, which is no failure."""
        self._work.progress.note(f"speed is n/a: {obstacle}")
        self._reasons = dict.fromkeys((*KERNELS, "decode"), obstacle)
        self._implementation, self._sparsity = "n/a", sparsity
        self.finish()

    def decoding(self, model: nn.Module, found: Decoding, sparsity: float) -> None:
        """Two facts, or one where there is no sparse implementation."""
        from prosparse_core.decode import decode_speedup_limit

        self._limit["decode"] = decode_speedup_limit(model, sparsity)
        config: Any = model.config
        conditions = {
            "kernel": "decode",
            "d_model": config.hidden_size,
            "d_ff": config.intermediate_size,
            "num_tokens": 1,
            "dtype": "float32",
            "sparsity": sparsity,
            "mask_source": "recorded",
            "threads": self._threads,
            "timer": found.timer,
            **self._columns,
        }
        dense, sparse = _quantiles_us(found.dense_s), _quantiles_us(found.sparse_s)
        self._facts.append({"provider": "transformers_dense", **conditions, **dense, "gate_passed": True})
        if self._no_native or found.implementation == "dense":
            self._reasons["decode"] = self._no_native or found.why
            return
        if found.problem:
            self._failed.append(f"decode: {found.problem}")
            self._reasons["decode"] = found.problem
            sparse = dict.fromkeys(sparse)
        else:
            self._speedup["decode"] = dense["p50_us"] / sparse["p50_us"]
        self._facts.append(
            {
                "provider": "transformers_sparse",
                **conditions,
                **sparse,
                "rel_err": _number(found.rel_err),
                "gate_passed": found.problem is None,
                "byte_ratio": self._limit["decode"],
                "note": found.problem or f"{found.implementation} kernels",
            }
        )

    def finish(self) -> None:
        """Write the facts, as shares of the best rate at which memory was read before and after all of it.

        ``gate_passed``: nothing that ran disagreed with its reference; ``reasons``: why a speed-up is None.

        ``speedup_certified`` is that of the FFN with a screened gate, ``speedup_batches`` that of the FFN by tokens.
        ``speedup`` of ``decode`` is that of the exact native loop over the same loop dense (where the native decoder
        does not know the architecture, of sparse FFNs in transformers over dense ones); ``decode`` has every way.
        """
        if self._ceiling is not None:
            self._ceiling = max(self._ceiling, read_ceiling(self._threads))
        for fact in self._facts:
            gbps = fact.get("gbps")
            share = None if gbps is None or self._ceiling is None else gbps / self._ceiling
            self._work.fact("speed", **fact, bandwidth_share=share)
        for failure in self._failed:
            self._work.progress.note(f"correctness gate failed: {failure}")
        self._work.meta.update(
            speedup=self._speedup,
            speedup_over_own_dense=self._over_own_dense,
            speedup_certified=self._certified,
            speedup_batches=self._batches,
            decode=self._decode,
            ceiling_gbps=self._ceiling,
            limit=self._limit,
            implementation=self._implementation,
            gate_passed=not self._failed,
            reasons=self._reasons,
            sparsity=_number(self._sparsity),
            threads=self._threads,
        )
        self._work.progress.update(1.0, 1.0)


def read_ceiling(threads: int) -> float:
    """The rate at which this machine reads memory now, in 1e9 bytes/s."""
    from kernels.measure import read_bandwidth_gbps

    return read_bandwidth_gbps(threads, repeats=4)


def _is(summary: Mapping[str, Any], provider: str, dtype: str, mask_source: str) -> bool:
    return (summary["provider"], summary["dtype"], summary["mask_source"]) == (provider, dtype, mask_source)


def _quantiles_us(seconds: Sequence[float]) -> dict[str, Any]:
    """Of one token; None without a measurement."""
    import numpy as np

    if not seconds:
        return dict.fromkeys(("p20_us", "p50_us", "p80_us", "num_reps", "tokens_per_s"))
    p20, p50, p80 = (1e6 * float(q) for q in np.percentile(seconds, [20, 50, 80]))
    return {"p20_us": p20, "p50_us": p50, "p80_us": p80, "num_reps": len(seconds), "tokens_per_s": 1e6 / p50}


def _ratio(baseline: Row, candidate: Row) -> float | None:
    """How much faster the candidate is, if both passed the gate and were timed."""
    times = (baseline.p50_us, candidate.p50_us)
    if not (baseline.gate_passed and candidate.gate_passed and all(math.isfinite(t) and t > 0 for t in times)):
        return None
    return baseline.p50_us / candidate.p50_us


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _finite(columns: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and the ledger know no nan: what was not measured is None."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in columns.items()}
