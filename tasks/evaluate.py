"""evaluate: perplexity per corpus, sparsity of the very same forward passes, and benchmarks; all through lm-eval."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.progress import Progress, Silent
from prosparse_core.store import Artifact, write_json
from prosparse_core.variants import Variant
from tasks.evaluation.benchmark_data import Datasets
from tasks.evaluation.benchmarks import Planned, plan_benchmarks
from tasks.evaluation.held_out import (
    CHOICES_TASK,
    NO_CHOICES,
    HeldOut,
    Score,
    choices_task,
    corpus_scores,
    corpus_task,
    read_held_out,
)
from tasks.evaluation.scores import harness_scores
from tasks.evaluation.scoring import evaluating, load_task, make_scorer, quiet, run_task
from tasks.step import Run, Work

if TYPE_CHECKING:
    from prosparse_core.sparsity import LayerSparsity

VERSION = 2
RESULTS = "results.json"
MIN_LENGTH = 512
"""Documents are scored in windows of at least this many tokens, as far as the model's context reaches."""


@dataclass(frozen=True)
class Evaluation:
    """What one model scored, with the conditions that belong to every number."""

    scores: tuple[Score, ...]
    layers: Mapping[str, Sequence[LayerSparsity]]
    """Per corpus, from the forward passes of its perplexity; every forwarded position counts, padding does not."""
    conditions: Mapping[str, Any]
    """precision, batch_size, max_length, prefix, limit, harness_version."""
    raw: Mapping[str, Any]
    """lm-eval's own results by task."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each benchmark took."""

    @property
    def perplexity(self) -> dict[str, float | None]:
        """Token perplexity by corpus."""
        return {s.corpus: s.value for s in self.scores if s.corpus and s.metric == "token_perplexity"}

    @property
    def sparsity(self) -> dict[str, float]:
        """Mean over layers by corpus."""
        return {corpus: sum(s.sparsity for s in layers) / len(layers) for corpus, layers in self.layers.items()}

    @property
    def accuracy(self) -> dict[str, float | None]:
        """acc of the held-out questions; benchmarks have rows of their own."""
        return {s.task: s.value for s in self.scores if s.task == CHOICES_TASK and s.metric == "acc"}


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

    section = run.recipe.evaluate
    held_out = None if corpora is None else read_held_out(corpora.path, choice=section.choice)
    model, tokenizer = load_variant(variant, device)
    how: dict[str, Any] = {
        "precision": precision,
        "batch_size": section.batch_size,
        "limit": section.limit,
        "progress": work.progress,
    }
    parts = []
    if held_out is not None:
        parts.append(measure_held_out(model, tokenizer, held_out, **how))
    if planned:
        parts.append(measure_benchmarks(model, tokenizer, planned, datasets, **how))
    record(work, run.recipe.model.id, variant, together(parts))


def together(parts: Sequence[Evaluation]) -> Evaluation:
    """Measurements of one model as one; conditions they share are said once."""
    raw: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, entries in part.raw.items():
            raw.setdefault(section, {}).update(entries)
    return Evaluation(
        scores=tuple(score for part in parts for score in part.scores),
        layers={corpus: layers for part in parts for corpus, layers in part.layers.items()},
        conditions={key: value for part in parts for key, value in part.conditions.items()},
        raw=raw,
        seconds={name: value for part in parts for name, value in part.seconds.items()},
    )


def record(work: Work, model: str, variant: Variant, found: Evaluation) -> None:
    """Write an evaluation into a step's folder, facts and meta."""
    conditions = found.conditions
    work.fact("variants", **variant.fact(model))
    for score in found.scores:
        work.fact(
            "evaluations",
            variant=variant.id,
            **{k: v for k, v in asdict(score).items() if k != "partial"},
            limit=conditions["limit"] if score.partial else None,
            batch_size=conditions["batch_size"],
            dtype=conditions["precision"],
            harness_version=conditions["harness_version"],
        )
    thresholds = variant.layer_thresholds()
    for corpus, layers in found.layers.items():
        for layer in layers:
            # ReLU is FATReLU at threshold 0; the dense activation has no threshold at all.
            threshold = thresholds[layer.layer] if thresholds else 0.0 if variant.activation == "relu" else None
            work.fact("sparsity", variant=variant.id, corpus=corpus, threshold=threshold, **asdict(layer))
    write_json(work.folder / RESULTS, {"conditions": dict(conditions), **found.raw})
    measured = {"perplexity": found.perplexity, "sparsity": found.sparsity, "accuracy": found.accuracy}
    benchmarks = [asdict(s) for s in found.scores if s.task and s.task != CHOICES_TASK]
    work.meta.update(setting=variant.setting, **measured, **conditions, benchmarks=benchmarks, seconds=found.seconds)


def measure_loaded(
    model: Any,
    tokenizer: Any,
    folder_of_heldout: Path,
    *,
    corpora: list[str] | None = None,
    choice: bool = True,
    **how: Any,
) -> Evaluation:
    """:func:`measure_held_out` on a mixture's evaluation files, read and checked first.

    Raises:
        BadInput: see :func:`tasks.evaluation.held_out.read_held_out` and :func:`measure_held_out`.
    """
    return measure_held_out(model, tokenizer, read_held_out(folder_of_heldout, corpora, choice=choice), **how)


def measure_held_out(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    precision: Precision,
    batch_size: int,
    limit: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and sparsity of every corpus, then the multiple-choice questions; changes nothing in the model.

    Args:
        limit: at most this many documents per task; marks what it cuts as partial.
        max_length: tokens per window; default ``max(512, seq_len)``. Never beyond the model's context.

    Raises:
        BadInput: the tokenizer has neither BOS nor EOS, or makes no token of a whole corpus.
        ProSparseError: the model's log-likelihoods are not finite.
    """
    from prosparse_core.data.packing import Encoder
    from prosparse_core.sparsity import SparsityMeter

    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit}: at least 1 document per task")
    progress = progress or Silent()
    context = getattr(model.config, "max_position_embeddings", None)
    max_length = max_length or max(MIN_LENGTH, held_out.seq_len)
    max_length = min(max_length, context) if context else max_length
    encoder = Encoder(tokenizer)
    sizes = held_out.sizes(limit)
    scores: list[Score] = []
    layers: dict[str, list[LayerSparsity]] = {}
    raw: dict[str, dict[str, Any]] = {}
    with quiet(), evaluating(model):
        scorer = make_scorer(model, tokenizer, precision=precision, batch_size=batch_size, max_length=max_length)

        def run(spec: dict[str, Any], number: int) -> dict[str, Any]:
            before, name = sum(sizes[:number]), spec["task"]
            scorer.on_progress = lambda share: progress.update(before + share * sizes[number], sum(sizes), task=name)
            return run_task(scorer, load_task(spec), limit, raw)

        about = f"prefix {scorer.prefix} ({scorer.prefix_kind}), windows of {max_length} tokens"
        for number, (corpus, rows) in enumerate(held_out.corpora.items()):
            contexts = _contexts(corpus, rows, encoder)
            with SparsityMeter(model) as meter:
                scorer.meter, scorer.ends_prompt_as_written = meter, True
                results = run(corpus_task(corpus, rows, contexts, scorer.num_scored), number)
                scorer.meter, scorer.ends_prompt_as_written = None, False
                samples = results["samples"][corpus]
                if not any(sample["token_perplexity"][1] for sample in samples):
                    raise BadInput(f"corpus {corpus!r}: the tokenizer makes not one token of its documents")
                layers[corpus] = meter.layers()
            note = f"stderr by the delta method over {len(samples)} documents; {about}"
            note += "; loss on the answers only" if contexts[0] is not None else ""
            scores += corpus_scores(corpus, samples, partial=len(samples) < len(rows), note=note)
        if held_out.choices:
            results = run(choices_task(held_out.choices), len(held_out.corpora))
            partial = len(results["samples"][CHOICES_TASK]) < len(held_out.choices)
            scores += harness_scores(results, CHOICES_TASK, headline="acc", partial=partial, note=about)
        elif held_out.choices is not None:
            scores.append(Score("acc", None, None, 0, True, task=CHOICES_TASK, headline=True, note=NO_CHOICES))
    conditions = {
        "precision": precision,
        "batch_size": batch_size,
        "max_length": max_length,
        "prefix": scorer.prefix,
        "limit": limit,
        "harness_version": harness_version(),
    }
    return Evaluation(tuple(scores), layers, conditions, raw)


def _contexts(corpus: str, rows: Sequence[Mapping[str, Any]], encoder: Any) -> list[str | None]:
    """What precedes each text unscored: its prompt, written as in training."""
    prompts = [row["prompt"] for row in rows]
    if all(p is None for p in prompts):
        return [None] * len(rows)
    if None in prompts:
        raise BadInput(f"corpus {corpus!r} mixes documents with and without a prompt", hint="prepare the mixture again")
    before, between, _ = encoder.chat_format()
    return [f"{before}{p}{between}" for p in prompts]


def harness_version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem("lm-eval is not installed", hint="make setup installs everything") from None
