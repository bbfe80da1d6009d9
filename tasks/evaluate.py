"""evaluate: perplexity per corpus, sparsity of the very same forward passes, and benchmarks; all through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.store import Artifact, write_json
from prosparse_core.variants import Variant
from tasks.evaluation.benchmark_data import Datasets
from tasks.evaluation.benchmarks import Planned, plan_benchmarks
from tasks.evaluation.evaluation import Evaluation, harness_version, together
from tasks.evaluation.held_out import CHOICES_TASK, read_held_out
from tasks.step import Run, Work

VERSION = 3
RESULTS = "results.json"


def evaluate(run: Run, variant: Variant, corpora: Artifact | None, note: str = "") -> Artifact:
    """The artifact with the harness's ``results.json`` and the facts of one variant.

    Args:
        corpora: the mixture whose evaluation files give perplexity and sparsity; None: benchmarks only.
        note: what people read instead of the setting, where several variants have the same.

    Raises:
        BadInput: before the model is read, where a benchmark cannot be measured as asked; see its ``benchmarks``.
    """
    recipe = run.recipe
    planned, datasets = plan_benchmarks(recipe.evaluate)
    device = resolve_device(recipe.runtime.device)
    precision = resolve(recipe.model.precision, device)
    return run.step(
        "evaluate",
        f"evaluate · {note or variant.setting}",
        lambda work: _build(work, run, variant, corpora, planned, datasets, precision, device),
        version=VERSION,
        config={
            # What the data are counts, not where they lie.
            "evaluate": recipe.evaluate.model_dump(mode="json", exclude={"benchmarks", "datasets", "run_code"}),
            "benchmarks": [p.identity for p in planned],
            "precision": precision,
            "variant": variant.identity,
            "harness_version": harness_version(),
        },
        inputs={**variant.inputs, **({} if corpora is None else {"corpora": corpora})},
    )


def _build(
    work: Work,
    run: Run,
    variant: Variant,
    corpora: Artifact | None,
    planned: Sequence[Planned],
    datasets: Datasets,
    precision: Precision,
    device: str,
) -> None:
    from prosparse_core.variants import load_variant
    from tasks.evaluation.measure_benchmarks import measure_benchmarks
    from tasks.evaluation.measure_held_out import measure_held_out
    from tasks.evaluation.parts import Parts

    section = run.recipe.evaluate
    held_out = None if corpora is None else read_held_out(corpora.path, choice=section.choice)
    model, tokenizer = load_variant(variant, device)
    parts = Parts(work.folder)
    how: dict[str, Any] = {
        "precision": precision,
        "batch_size": section.batch_size,
        "limit": section.limit,
        "progress": work.progress,
        "parts": parts,
    }
    found = []
    if held_out is not None:
        found.append(measure_held_out(model, tokenizer, held_out, **how))
    if planned:
        found.append(measure_benchmarks(model, tokenizer, planned, datasets, **how))
    record(work, run.recipe.model.id, variant, together(found))
    parts.clear()


def record(work: Work, model: str, variant: Variant, found: Evaluation) -> None:
    """Write an evaluation into a step's folder, facts and meta."""
    conditions = found.conditions
    work.fact("variants", **variant.fact(model))
    for score in found.scores:
        work.fact(
            "evaluations",
            variant=variant.id,
            **score.row,
            limit=conditions["limit"] if score.partial else None,
            batch_size=conditions["batch_size"],
            dtype=conditions["precision"],
            harness_version=conditions["harness_version"],
        )
        if score.documents:
            work.fact(
                "document_scores",
                variant=variant.id,
                task=score.task,
                corpus=score.corpus,
                metric=score.metric,
                part_of=score.part_of,
                share=score.share,
                dtype=conditions["precision"],
                num_fewshot=score.num_fewshot,
                window_tokens=score.window_tokens,
                documents=score.documents,
                sums=list(score.sums),
                counts=list(score.counts),
            )
    thresholds = variant.layer_thresholds()
    for corpus, layers in found.layers.items():
        for layer in layers:
            # ReLU is FATReLU at threshold 0; the dense activation has no threshold at all.
            threshold = thresholds[layer.layer] if thresholds else 0.0 if variant.activation == "relu" else None
            work.fact("sparsity", variant=variant.id, corpus=corpus, threshold=threshold, **asdict(layer))
    write_json(work.folder / RESULTS, {"conditions": dict(conditions), **found.raw})
    measured = {"perplexity": found.perplexity, "sparsity": found.sparsity, "accuracy": found.accuracy}
    benchmarks = [{**s.row, "partial": s.partial} for s in found.scores if s.task and s.task != CHOICES_TASK]
    work.meta.update(setting=variant.setting, **measured, **conditions, benchmarks=benchmarks, seconds=found.seconds)
