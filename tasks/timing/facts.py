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
    from kernels.measure import ReadCeiling
    from prosparse_core.variants import Variant

KERNELS = ("s2", "s3", "ffn")
DENSE = ("torch", "native_dense")
Report = Callable[[float, float], None]


class Reporter:
    """Turns measurements into facts, progress and the meta of the step.

    ``ceiling`` reads memory between the measurements, where there are native kernels to do so.
    """

    def __init__(self, work: Work, run: Run, variant: Variant | None, no_native: str | None) -> None:
        machine = provenance()
        self._work, self._no_native = work, no_native
        self._facts: list[dict[str, Any]] = []
        self.ceiling = None if no_native else read_ceiling(run.recipe.speed.threads)
        name = None if variant is None else variant.id
        self._columns = {"variant": name, "cpu": machine["cpu"], "host": machine["host"], "device": "cpu"}
        self._threads = run.recipe.speed.threads
        self._timer = "process_cpu" if self._threads == 1 else "wall"
        self._speedup: dict[str, float | None] = dict.fromkeys((*KERNELS, "decode"))
        self._baseline: dict[str, str | None] = dict.fromkeys((*KERNELS, "decode"))
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

    def probe(self) -> None:
        """Read memory once, at the moment of the measurements."""
        if self.ceiling is not None:
            self.ceiling.probe()

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
            self._batches[str(rows[0].num_tokens)] = _over_best(found, "ffn", "native")[0]
            return
        self._sparsity = rows[0].sparsity
        self._certified, _ = _over_best(found, "ffn", "certified")
        for kernel in KERNELS:
            self._speedup[kernel], self._baseline[kernel] = _over_best(found, kernel, "native")
            if self._speedup[kernel] is None:
                self._reasons[kernel] = self._no_native or "failed the correctness gate, or was not timed"

    def ways(
        self, model: nn.Module, ways: Sequence[Way], raised: str | None, original: str | None, prompt_tokens: int
    ) -> None:
        """One fact for each way to decode; those of recorded masks in float32, after the first prompts that are told,
        decide the speed-up.

        Args:
            raised: what was done to the thresholds of the ways with mask source ``raised``.
            original: the variant that the ways without masks decode.
            prompt_tokens: length of the prompts.
        """
        dense = {(w.dtype, w.mask_source): w for w in ways if w.provider == "native_dense"}
        for way in ways:
            own = dense[way.dtype, way.mask_source]
            # What a mask lets live is one number for all ways of computing it, so that they can be compared.
            live = _mean(own.live)
            sparsity = None if way.mask_source is None or live is None else 1.0 - live
            times = _quantiles_us([] if way.problem else way.seconds)
            whole, num_bytes = _mean(own.bytes_read), _mean(way.bytes_read or own.bytes_read)
            notes = [way.problem or way.note, raised if way.mask_source == RAISED else None]
            is_dense = way.provider.endswith("_dense") or way.mask_source is None
            fact = {
                **self._decoding(model, way.provider, prompt_tokens),
                "dtype": way.dtype,
                "sparsity": 0.0 if sparsity is None else sparsity,
                "mask_source": way.mask_source,
                **times,
                "gbps": None if times["p50_us"] is None or num_bytes is None else num_bytes / (1e3 * times["p50_us"]),
                "live_frac": statistics.fmean(way.live) if way.live else 1.0,
                "rel_err": _number(way.rel_err),
                "gate_passed": way.problem is None,
                **_bytes(whole, None if is_dense else num_bytes),
                "cutoff": way.cutoff,
                "note": "; ".join(n for n in notes if n) or None,
            }
            if way.mask_source is None:
                fact["variant"] = original
            if way.problem:
                place = f"{way.mask_source} masks, prompts of {prompt_tokens} tokens"
                self._failed.append(f"decode, {way.provider} of {way.dtype} ({place}): {way.problem}")
            self._facts.append(fact)
            self._decode.append(self._summary(way, fact, ways))
        if self._speedup["decode"] is not None or "decode" in self._reasons:
            return
        exact = next((d for d in self._decode if _is(d, "native_exact", "float32", RECORDED)), None)
        if exact is None:
            self._reasons["decode"] = "the activation has no exact zeros"
        elif exact["speedup"] is None:
            self._reasons["decode"] = "failed the correctness gate"
        else:
            self._speedup["decode"], self._baseline["decode"] = exact["speedup"], exact["baseline"]

    def _decoding(self, model: nn.Module, provider: str, prompt_tokens: int) -> dict[str, Any]:
        """What every fact of decoding says."""
        config: Any = model.config
        return {
            **self._columns,
            "kernel": "decode",
            "provider": provider,
            "d_model": config.hidden_size,
            "d_ff": config.intermediate_size,
            "num_tokens": 1,
            "prompt_tokens": prompt_tokens,
            "threads": self._threads,
            "timer": self._timer,
        }

    @staticmethod
    def _summary(way: Way, fact: Mapping[str, Any], ways: Sequence[Way]) -> dict[str, Any]:
        """What meta keeps of a way: milliseconds of one token, and how much faster it is than the best dense way."""
        rivals = [
            w
            for w in ways
            if (w.dtype, w.mask_source) == (way.dtype, way.mask_source)
            and w.provider.endswith("_dense")
            and not w.problem
            and w.seconds
        ]
        best = min(rivals, key=lambda w: statistics.median(w.seconds), default=None)
        is_judged = best is not None and not way.provider.endswith("_dense") and not way.problem and way.seconds
        kept = ("provider", "dtype", "mask_source", "cutoff", "prompt_tokens", "sparsity", "live_frac", "gbps", "note")
        return {
            **{name: fact[name] for name in kept},
            "ms": None if fact["p50_us"] is None else fact["p50_us"] / 1e3,
            "speedup": statistics.median(best.seconds) / statistics.median(way.seconds) if best and is_judged else None,
            "baseline": best.provider if best and is_judged else None,
            "byte_ratio": fact["byte_ratio"],
        }

    def missing(
        self, provider: str, dtype: str, variant: str | None, why: str, prompt_tokens: int | None = None
    ) -> None:
        """What was to be timed and could not be."""
        self._facts.append(
            {
                **self._columns,
                "variant": variant,
                "kernel": "decode",
                "provider": provider,
                "num_tokens": 1,
                "prompt_tokens": prompt_tokens,
                "dtype": dtype,
                "threads": self._threads,
                "timer": self._timer,
                "note": f"n/a: {why}",
            }
        )

    def absent_prompts(self, reasons: Mapping[int, str]) -> None:
        """Lengths of prompts after which nothing was decoded, and why."""
        for length, why in reasons.items():
            self.missing("native_exact", "float32", self._columns["variant"], why, length)
            self._work.progress.note(f"no decoding after {length} tokens: {why}")
        if self._speedup["decode"] is None and reasons:
            self._reasons.setdefault("decode", next(iter(reasons.values())))

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

    def decoding(self, model: nn.Module, found: Decoding, sparsity: float, prompt_tokens: int) -> None:
        """Two facts, or one where there is no sparse implementation."""
        from prosparse_core.decode import decode_bytes

        whole, some = decode_bytes(model), decode_bytes(model, sparsity)
        same = {"dtype": "float32", "sparsity": sparsity, "mask_source": "recorded"}
        dense, sparse = _quantiles_us(found.dense_s), _quantiles_us(found.sparse_s)
        shared = {**self._decoding(model, "transformers_dense", prompt_tokens), **same}
        self._facts.append({**shared, **dense, **_bytes(whole, None), "gate_passed": True})
        if self._no_native or found.implementation == "dense":
            self._reasons["decode"] = self._no_native or found.why
            return
        if found.problem:
            self._failed.append(f"decode: {found.problem}")
            sparse = dict.fromkeys(sparse)
        if self._speedup["decode"] is None and "decode" not in self._reasons:  # the first prompts decide
            if found.problem:
                self._reasons["decode"] = found.problem
            else:
                self._speedup["decode"] = dense["p50_us"] / sparse["p50_us"]
                self._baseline["decode"] = "transformers_dense"
        self._facts.append(
            {
                **self._decoding(model, "transformers_sparse", prompt_tokens),
                **same,
                **sparse,
                "rel_err": _number(found.rel_err),
                "gate_passed": found.problem is None,
                **_bytes(whole, some),
                "note": found.problem or f"{found.implementation} kernels",
            }
        )

    def finish(self) -> None:
        """Write the facts, as shares of the best rate at which memory was read in between.

        ``gate_passed``: nothing that ran disagreed with its reference; ``reasons``: why a speed-up is None.

        ``speedup`` is over the faster of torch and our own dense kernel of this very session, which ``baseline`` names;
        of ``decode`` it is that of the exact native loop over the faster of transformers and the same loop dense (where
        the native decoder does not know the architecture, of sparse FFNs in transformers over dense ones), after the
        shortest prompts; ``decode`` has every way. ``speedup_certified`` is that of the FFN with a screened gate,
        ``speedup_batches`` that of the FFN by tokens.
        """
        if self.ceiling is not None:
            self.ceiling.probe_all()
        best = None if self.ceiling is None else self.ceiling.gbps
        for fact in self._facts:
            gbps, in_cache = fact.get("gbps"), fact.get("weights_bytes", math.inf) <= fact.get("cache_bytes", 0)
            share = None if gbps is None or best is None or in_cache else gbps / best
            self._work.fact("speed", **fact, bandwidth_share=share)
        for failure in self._failed:
            self._work.progress.note(f"correctness gate failed: {failure}")
        self._work.meta.update(
            speedup=self._speedup,
            baseline=self._baseline,
            speedup_certified=self._certified,
            speedup_batches=self._batches,
            decode=self._decode,
            ceiling_gbps=best,
            implementation=self._implementation,
            gate_passed=not self._failed,
            reasons=self._reasons,
            sparsity=_number(self._sparsity),
            threads=self._threads,
        )
        self._work.progress.update(1.0, 1.0)


def read_ceiling(threads: int) -> ReadCeiling:
    """What reads memory as fast as this machine can."""
    from kernels.measure import ReadCeiling

    return ReadCeiling(threads)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _bytes(dense: float | None, num_bytes: float | None) -> dict[str, Any]:
    """What a dense way reads for a token, and the ratio to what another reads (None: it is dense itself, or failed)."""
    from kernels.measure import fits_cache, last_level_cache_bytes

    if dense is None:
        return {"byte_ratio": None}
    found = {"weights_bytes": round(dense), "cache_bytes": last_level_cache_bytes()}
    in_cache = fits_cache(dense)
    if num_bytes is None:
        return {**found, "byte_ratio": None, "byte_ratio_note": None}
    return {**found, "byte_ratio": None if in_cache else dense / num_bytes, "byte_ratio_note": in_cache}


def _is(summary: Mapping[str, Any], provider: str, dtype: str, mask_source: str) -> bool:
    return (summary["provider"], summary["dtype"], summary["mask_source"]) == (provider, dtype, mask_source)


def _quantiles_us(seconds: Sequence[float]) -> dict[str, Any]:
    """Of one token; None without a measurement."""
    import numpy as np

    if not seconds:
        return dict.fromkeys(("p20_us", "p50_us", "p80_us", "num_reps", "tokens_per_s"))
    p20, p50, p80 = (1e6 * float(q) for q in np.percentile(seconds, [20, 50, 80]))
    return {"p20_us": p20, "p50_us": p50, "p80_us": p80, "num_reps": len(seconds), "tokens_per_s": 1e6 / p50}


def _over_best(found: Mapping[tuple[str, str], Row], kernel: str, provider: str) -> tuple[float | None, str | None]:
    """How much faster it is than the fastest dense kernel, and which that is, if both passed the gate."""
    rivals = [row for name in DENSE if (row := found[kernel, name]) if _is_timed(row)]
    candidate, best = found[kernel, provider], min(rivals, key=lambda row: row.p50_us, default=None)
    if best is None or not _is_timed(candidate):
        return None, None
    return best.p50_us / candidate.p50_us, best.provider


def _is_timed(row: Row) -> bool:
    return row.gate_passed and math.isfinite(row.p50_us) and row.p50_us > 0


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _finite(columns: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and the ledger know no nan: what was not measured is None."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in columns.items()}
