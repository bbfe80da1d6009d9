"""speed: the sparse kernels against torch dense on this variant's own masks, and decoding with them (paper, App. D).

A kernel is timed only after it agrees with the readable reference, and a ratio is taken only between timings of one
session under equal conditions. What cannot be measured is None with a reason, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import EnvironmentProblem
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.sparse_decode import Decoding, Report, time_decoding
from tasks.step import Run, Work, provenance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kernels.bench import FFNWeights, Row
    from prosparse_core.recording import Recording

VERSION = 2
KERNELS = ("s2", "s3", "ffn")
BATCHES = (2, 4, 8)
"""Tokens at once, besides one: the whole FFN on the neurons that live for any of them."""
RECORDED_SHARE, BATCH_SHARE, RANDOM_SHARE, DECODE_SHARE = 0.4, 0.1, 0.15, 0.35
"""Of ``speed.budget_s``."""
PROMPT_TOKENS = 32


def speed(run: Run, variant: Variant, corpora: Artifact) -> Artifact:
    """The artifact whose meta holds the speed-ups of S2, S3, the whole FFN and decoding over dense torch, on the CPU.

    The machine is part of its identity: another CPU, or a compiler that was not there before, measures anew.
    """
    section = run.recipe.speed
    return run.step(
        "speed",
        f"speed · {variant.setting}, {section.threads} thread" + ("s" if section.threads > 1 else ""),
        lambda work: _build(work, run, variant, corpora),
        version=VERSION,
        config={
            "speed": section.model_dump(mode="json"),
            "variant": variant.identity,
            "cpu": provenance()["cpu"],
            "compiler": _has_compiler(),
        },
        inputs={**variant.inputs, "corpora": corpora},
    )


def _has_compiler() -> bool:
    from kernels.build import find_compiler

    try:
        find_compiler()
    except RuntimeError:
        return False
    return True


def _build(work: Work, run: Run, variant: Variant, corpora: Artifact) -> None:
    from kernels import cpu
    from kernels.bench import bench_layers
    from kernels.measure import torch_threads
    from prosparse_core.decode import ffn_thresholds, why_not_sparse
    from prosparse_core.families import find_ffns
    from prosparse_core.mixing import Mixture
    from prosparse_core.recording import held_out_windows
    from prosparse_core.variants import load_variant

    section = run.recipe.speed
    native = cpu.available()
    if native and section.threads > 1 and not cpu.load().openmp:
        raise EnvironmentProblem(
            f"speed.threads={section.threads}: this machine's compiler has no OpenMP", hint="use --set speed.threads=1"
        )
    model, tokenizer = load_variant(variant, "cpu")
    windows = list(held_out_windows(Mixture(corpora.path, run.recipe.seed), tokenizer))
    report = _Reporter(work, run, variant, None if native else f"no native kernels: {native.why}")
    if obstacle := why_not_sparse(find_ffns(model)[0]):
        recording = _record(model, windows, section.num_tokens)
        report.nothing(obstacle, sum(layer.sparsity for layer in recording.layers) / len(recording.layers))
        return
    thresholds = ffn_thresholds(model)
    with torch_threads(section.threads):
        recording = _record(model, windows, section.num_tokens)
        weights, inputs = _weights(model), [layer.inputs for layer in recording.layers]
        rows = bench_layers(
            weights,
            inputs,
            thresholds,
            mask_source="recorded",
            threads=section.threads,
            budget_s=RECORDED_SHARE * section.budget_s,
            progress=report.part("kernels", 0.0, RECORDED_SHARE),
        )
        report.kernels(rows)
        batches = [n for n in BATCHES if n <= min(len(x) for x in inputs)]
        for i, num_tokens in enumerate(batches):
            share = BATCH_SHARE / len(batches)
            rows = bench_layers(
                weights,
                inputs,
                thresholds,
                mask_source="recorded",
                kernels=("ffn",),
                threads=section.threads,
                num_tokens=num_tokens,
                budget_s=share * section.budget_s,
                progress=report.part(f"{num_tokens} tokens at once", RECORDED_SHARE + i * share, share),
            )
            report.kernels(rows)
        if missing := set(BATCHES) - set(batches):
            work.progress.note(f"not measured with {max(missing)} tokens at once: speed.num_tokens is too small")
        if random := _random_inputs(weights, recording, run.recipe.seed):
            random_rows = bench_layers(
                weights,
                *random,
                mask_source="random",
                threads=section.threads,
                budget_s=RANDOM_SHARE * section.budget_s,
                progress=report.part("random masks", RECORDED_SHARE + BATCH_SHARE, RANDOM_SHARE),
            )
            report.kernels(random_rows)
        else:
            work.progress.note("no random masks: a layer is less than half sparse, which no threshold gives at random")
        del weights, inputs
        decoded = time_decoding(
            model,
            thresholds,
            [tokens[:, :PROMPT_TOKENS] for tokens in _first_of_each_corpus(windows)],
            num_new=section.decode_tokens,
            threads=section.threads,
            budget_s=DECODE_SHARE * section.budget_s,
            progress=report.part("decode", RECORDED_SHARE + BATCH_SHARE + RANDOM_SHARE, DECODE_SHARE),
        )
    sparsity = sum(layer.sparsity for layer in recording.layers) / len(recording.layers)
    report.decoding(model, decoded, sparsity)
    report.finish()


def _record(model: nn.Module, windows: Sequence[tuple[str, Tensor]], num_tokens: int) -> Recording:
    """``num_tokens`` inputs per layer, spread over one window of each corpus, in fp32: the masks must be reproduced."""
    import torch

    from prosparse_core.recording import record

    available = sum(tokens.numel() for tokens in _first_of_each_corpus(windows))
    stride = max(1, available // num_tokens)
    batches = (tokens for _, tokens in windows)
    return record(model, batches, num_tokens=num_tokens, precision="fp32", dtype=torch.float32, stride=stride)


def _first_of_each_corpus(windows: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    return list(dict(reversed(windows)).values())[::-1]


def _weights(model: nn.Module) -> list[FFNWeights]:
    from kernels.bench import FFNWeights
    from prosparse_core.families import find_ffns

    return [
        FFNWeights(f.act_weight.detach(), f.up_weight.detach(), f.down_weight.detach().t().contiguous())
        for f in find_ffns(model)
    ]


def _random_inputs(
    weights: Sequence[FFNWeights], recording: Recording, seed: int
) -> tuple[list[Tensor], list[float]] | None:
    """Gaussian inputs of the recorded size, thresholds for the recorded sparsity; None if a layer is below one half."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    inputs, thresholds = [], []
    for layer, recorded in zip(weights, recording.layers, strict=True):
        x = torch.randn(recorded.inputs.shape, generator=generator) * recorded.inputs.square().mean().sqrt()
        gates = (x @ layer.w_gate.T).flatten().sort().values
        threshold = float(gates[min(round(recorded.sparsity * len(gates)), len(gates) - 1)])
        if threshold <= 0:
            return None
        inputs.append(x)
        thresholds.append(threshold)
    return inputs, thresholds


class _Reporter:
    """Turns measurements into facts, progress and the meta of the step."""

    def __init__(self, work: Work, run: Run, variant: Variant, no_native: str | None) -> None:
        machine = provenance()
        self._work, self._no_native = work, no_native
        self._columns = {"variant": variant.id, "cpu": machine["cpu"], "host": machine["host"], "device": "cpu"}
        self._threads = run.recipe.speed.threads
        self._speedup: dict[str, float | None] = dict.fromkeys((*KERNELS, "decode"))
        self._over_own_dense: dict[str, float | None] = dict.fromkeys(KERNELS)
        self._limit: dict[str, float | None] = dict.fromkeys((*KERNELS, "decode"))
        self._certified: float | None = None
        self._batches: dict[str, float | None] = {}
        self._reasons: dict[str, str] = {}
        self._failed: list[str] = []
        self._sparsity = math.nan
        self._implementation = "dense" if no_native else "native"
        work.fact("variants", **variant.fact(run.recipe.model.id))
        if no_native:
            work.progress.note(f"{no_native}; only dense torch is timed")

    def part(self, phase: str, start: float, share: float) -> Report:
        def report(done: float, total: float) -> None:
            self._work.progress.update(start + share * min(1.0, done / total), 1.0, phase=phase)

        return report

    def kernels(self, rows: Sequence[Row]) -> None:
        """One fact per row; those of recorded masks also decide the speed-ups, of one token and of several."""
        found = {(row.kernel, row.provider): row for row in rows}
        for row in rows:
            missing = row.provider != "torch" and self._no_native
            note = missing or (None if row.gate_passed else "failed the correctness gate")
            if note and not missing:
                self._failed.append(
                    f"{row.kernel} of {row.provider} ({row.mask_source} masks, {row.num_tokens} at once)"
                )
            self._work.fact("speed", **_finite(asdict(row)), **self._columns, cache="cold", note=note)
        if rows[0].mask_source != "recorded":
            return
        if rows[0].num_tokens > 1:
            self._batches[str(rows[0].num_tokens)] = _ratio(found["ffn", "torch"], found["ffn", "native"])
            return
        self._sparsity = rows[0].sparsity
        self._certified = _ratio(found["ffn", "torch"], found["ffn", "certified"])
        for kernel in KERNELS:
            native = found[kernel, "native"]
            self._limit[kernel] = _number(native.limit_speedup)
            self._speedup[kernel] = _ratio(found[kernel, "torch"], native)
            self._over_own_dense[kernel] = _ratio(found[kernel, "native_dense"], native)
            if self._speedup[kernel] is None:
                self._reasons[kernel] = self._no_native or "failed the correctness gate, or was not timed"

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
        self._work.fact("speed", provider="transformers_dense", **conditions, **dense, gate_passed=True)
        if self._no_native or found.implementation == "dense":
            self._reasons["decode"] = self._no_native or found.why
            return
        if found.problem:
            self._failed.append(f"decode: {found.problem}")
            self._reasons["decode"] = found.problem
            sparse = dict.fromkeys(sparse)
        else:
            self._speedup["decode"] = dense["p50_us"] / sparse["p50_us"]
        self._work.fact(
            "speed",
            provider="transformers_sparse",
            **conditions,
            **sparse,
            rel_err=_number(found.rel_err),
            gate_passed=found.problem is None,
            limit_speedup=self._limit["decode"],
            note=found.problem or f"{found.implementation} kernels",
        )

    def nothing(self, obstacle: str, sparsity: float) -> None:
        """No kernel computes such an FFN: every speed-up is n/a for this reason, which is no failure."""
        self._work.progress.note(f"speed is n/a: {obstacle}")
        self._reasons = dict.fromkeys((*KERNELS, "decode"), obstacle)
        self._implementation, self._sparsity = "n/a", sparsity
        self.finish()

    def finish(self) -> None:
        """``gate_passed``: nothing that ran disagreed with its reference; ``reasons``: why a speed-up is None.

        ``speedup_certified`` is that of the FFN with a screened gate, ``speedup_batches`` that of the FFN by tokens.
        """
        for failure in self._failed:
            self._work.progress.note(f"correctness gate failed: {failure}")
        self._work.meta.update(
            speedup=self._speedup,
            speedup_over_own_dense=self._over_own_dense,
            speedup_certified=self._certified,
            speedup_batches=self._batches,
            limit=self._limit,
            implementation=self._implementation,
            gate_passed=not self._failed,
            reasons=self._reasons,
            sparsity=_number(self._sparsity),
            threads=self._threads,
        )
        self._work.progress.update(1.0, 1.0)


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
