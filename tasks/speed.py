"""speed: the sparse kernels against torch dense on this variant's own masks, and decoding with them (paper, App. D).

A kernel is timed only after it agrees with the readable reference, and a ratio is taken only between timings of one
session under equal conditions. What cannot be measured is None with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import EnvironmentProblem
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.step import Run, Work, provenance
from tasks.timing import llama_cpp_peer
from tasks.timing.decode import RECORDED
from tasks.timing.facts import Reporter
from tasks.timing.lengths import Case, time_every_length
from tasks.timing.native_decode import runs_silu

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kernels.bench import FFNWeights
    from prosparse_core.document_masks import Packed
    from prosparse_core.prediction.recording import Recording

VERSION = 6
BATCHES = (2, 4, 8)
"""Tokens at once, besides one: the whole FFN on the neurons that live for any of them."""
CURVE = (0.0, 0.5, 0.7, 0.8, 0.89, 0.95)
"""Sparsities of random masks at which the whole FFN is timed."""
RECORDED_SHARE, BATCH_SHARE, RANDOM_SHARE, CURVE_SHARE, DECODE_SHARE = 0.3, 0.1, 0.05, 0.05, 0.5
"""Of ``speed.budget_s``."""


def speed(
    run: Run,
    variant: Variant,
    corpora: Artifact,
    *,
    original: Variant | None = None,
    predictors: Artifact | None = None,
) -> Artifact:
    """The artifact whose meta holds the speed-ups of S2, S3, the whole FFN and decoding over dense ones, on the CPU.

    The machine is part of its identity: another CPU, or a compiler or an engine that was not there before, measures
    anew.

    Args:
        original: the dense model, which other engines decode.
        predictors: of this very variant; decoding with them is timed at each of their cutoffs.
    """
    section = run.recipe.speed
    others = {"original": original.checkpoint if original else None, "predictors": predictors}
    return run.step(
        "speed",
        f"speed · {variant.setting}, {section.threads} thread" + ("s" if section.threads > 1 else ""),
        lambda work: _build(work, run, variant, corpora, original, predictors),
        version=VERSION,
        config={
            "speed": section.model_dump(mode="json"),
            "variant": variant.identity,
            "cpu": provenance()["cpu"],
            "compiler": _has_compiler(),
            "llama_cpp": llama_cpp_peer.version(),
            "attend_across_documents": run.recipe.data.attend_across_documents,
        },
        inputs={**variant.inputs, "corpora": corpora, **{k: v for k, v in others.items() if v is not None}},
    )


def _has_compiler() -> bool:
    from kernels.build import find_compiler

    try:
        find_compiler()
    except RuntimeError:
        return False
    return True


def _build(
    work: Work, run: Run, variant: Variant, corpora: Artifact, original: Variant | None, predictors: Artifact | None
) -> None:
    from kernels import cpu
    from kernels.measure import torch_threads
    from prosparse_core.decode import why_not_sparse
    from prosparse_core.families import find_ffns
    from prosparse_core.mixing import Mixture
    from prosparse_core.prediction.recording import held_out_windows
    from prosparse_core.variants import load_variant

    section = run.recipe.speed
    native = cpu.available()
    if native and section.threads > 1 and not cpu.load().openmp:
        raise EnvironmentProblem(
            f"speed.threads={section.threads}: this machine's compiler has no OpenMP", hint="use --set speed.threads=1"
        )
    model, tokenizer = load_variant(variant, "cpu")
    mixture = Mixture(corpora.path, run.recipe.seed, attend_across=run.recipe.data.attend_across_documents)
    windows = list(held_out_windows(mixture, tokenizer))
    report = Reporter(work, run, variant, None if native else f"no native kernels: {native.why}")
    if original is not None and original.id != variant.id:
        work.fact("variants", **original.fact(run.recipe.model.id))
    if obstacle := why_not_sparse(find_ffns(model)[0]):
        recording = _record(model, windows, section.num_tokens)
        report.nothing(obstacle, sum(layer.sparsity for layer in recording.layers) / len(recording.layers))
        return
    sparsity = 0.0
    with torch_threads(section.threads):
        if runs_silu(model):
            report.no_kernels("SiLU leaves no exact zeros to skip")
        else:
            recording = _record(model, windows, section.num_tokens)
            sparsity = sum(layer.sparsity for layer in recording.layers) / len(recording.layers)
            _time_kernels(work, run, model, recording, report)
        time_every_length(
            Case(work, section, model, sparsity, original, predictors, report),
            [(corpus, window.tokens) for corpus, window in windows],
            is_native=bool(native),
            budget_s=DECODE_SHARE * section.budget_s,
            progress=report.part("decode", 1.0 - DECODE_SHARE, DECODE_SHARE),
        )
    report.finish()


def _time_kernels(work: Work, run: Run, model: nn.Module, recording: Recording, report: Reporter) -> None:
    """On the masks that the model itself makes, on random ones as sparse, and along a curve of random ones."""
    import torch

    from kernels.bench import bench_layers
    from kernels.providers import random_case, threshold_for
    from prosparse_core.decode import ffn_thresholds

    section, thresholds = run.recipe.speed, ffn_thresholds(model)
    weights, inputs = _weights(model), [layer.inputs for layer in recording.layers]
    done = 0.0

    def timed(
        phase: str, share: float, layers: Any, x: Any, cuts: Any, is_synthetic: bool = False, **settings: Any
    ) -> None:
        nonlocal done
        rows = bench_layers(
            layers,
            x,
            cuts,
            threads=section.threads,
            budget_s=share * section.budget_s,
            progress=report.part(phase, done, share),
            ceiling=report.ceiling,
            **settings,
        )
        done += share
        report.kernels(rows, decides=settings["mask_source"] == RECORDED, is_synthetic=is_synthetic)

    timed("kernels", RECORDED_SHARE, weights, inputs, thresholds, mask_source=RECORDED)
    batches = [n for n in BATCHES if n <= min(len(x) for x in inputs)]
    for n in batches:
        share = BATCH_SHARE / len(batches)
        settings: dict[str, Any] = {"mask_source": RECORDED, "kernels": ("ffn",), "num_tokens": n}
        timed(f"{n} tokens at once", share, weights, inputs, thresholds, **settings)
    if missing := set(BATCHES) - set(batches):
        work.progress.note(f"not measured with {max(missing)} tokens at once: speed.num_tokens is too small")
    if random := _random_inputs(weights, recording, run.recipe.seed):
        timed("random masks", RANDOM_SHARE, weights, *random, mask_source="random", kernels=("s2", "s3", "ffn"))
    else:
        work.progress.note("no random masks: a layer is less than half sparse, which no threshold gives at random")
    d_ff, d_model = weights[0].w_gate.shape
    layer, x, _ = random_case(d_model, d_ff, 0.0, torch.float32, run.recipe.seed)
    for zeros in CURVE:
        cuts = [threshold_for(x, layer.w_gate, zeros)]
        phase, share = f"random masks, {zeros:.0%} zeros", CURVE_SHARE / len(CURVE)
        timed(phase, share, [layer], [x], cuts, is_synthetic=True, mask_source="random", kernels=("ffn",))


def _record(model: nn.Module, windows: Sequence[tuple[str, Packed]], num_tokens: int) -> Recording:
    """``num_tokens`` inputs per layer, spread over one window of each corpus, in fp32: the masks must be reproduced."""
    import torch

    from prosparse_core.prediction.recording import record

    available = sum(window.tokens.numel() for window in _first_of_each_corpus(windows))
    stride = max(1, available // num_tokens)
    batches = (window for _, window in windows)
    return record(model, batches, num_tokens=num_tokens, precision="fp32", dtype=torch.float32, stride=stride)


def _first_of_each_corpus(windows: Sequence[tuple[str, Packed]]) -> list[Packed]:
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
