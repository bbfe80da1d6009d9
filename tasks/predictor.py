"""predictor: an activation predictor per layer, trained on training text, measured on held-out text (App. C and F).

Measured twice: how many of the active neurons it finds, and what computing only those costs in perplexity.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from prosparse_core.families import require_family
from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.recipe import Predictor
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL, Variant, check_folder
from tasks.predictor_quality import choose, held_out_tokens, mean_over_layers, measure_perplexity, write_facts
from tasks.step import Run, Work

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse_core.document_masks import Packed
    from prosparse_core.families import FFN
    from prosparse_core.prediction.recording import Recording
    from prosparse_core.predictor import CutoffMetrics, LayerPredictor

T = TypeVar("T")
VERSION = 4
WINDOWS_PER_FORWARD = 4
HEADLINE_CUTOFF = 0.5
"""A probability of one half: what inference engines use. The nearest cutoff of the recipe is the headline."""
RECORDINGS = "recordings"
"""Folder of the work in progress, not of the artifact: what the forward passes left for training."""
RECORDING_SHARE, PERPLEXITY_SHARE = 0.3, 0.3
"""Of the step's time, for the progress bar."""


def predictor(run: Run, variant: Variant, corpora: Artifact) -> Artifact:
    """The artifact with ``layer_<i>.safetensors`` for every layer; its meta holds the means over layers per cutoff.

    Meta besides: ``exact_perplexity`` beside the ``perplexity`` that each cutoff leaves, ``input``, and ``chosen`` (the
    cutoffs for ``predictor.target_recall`` with their metrics by layer; None when no target is set). Ledger:
    ``predictors`` has every layer and cutoff against both label rules; ``evaluations`` has the metric
    ``predicted_perplexity`` of tasks ``predictor/exact``, ``predictor/cutoff 0.5``, ...
    """
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    section = run.recipe.predictor
    return run.step(
        "predictor",
        f"predictor · {variant.setting}, hidden {section.hidden}",
        lambda work: _build(work, run, variant, corpora, precision, device),
        version=VERSION,
        config={
            "predictor": section.model_dump(mode="json"),
            "variant": variant.identity,
            "precision": precision,
            "attend_across_documents": run.recipe.data.attend_across_documents,
        },
        inputs={**variant.inputs, "corpora": corpora},
        needs_bytes=_bytes_of_recordings(section, variant),
    )


def _bytes_of_recordings(section: Predictor, variant: Variant) -> int:
    if variant.checkpoint.folder is None:
        return 0
    config = check_folder(variant.checkpoint.folder / MODEL)
    sizes = require_family(config, where=str(variant.checkpoint.folder)).sizes(config)
    num_tokens = section.train_tokens + section.test_tokens * (2 if section.target_recall else 1)
    return num_tokens * sizes.num_layers * (2 * sizes.d_model + sizes.d_ff // 4)


def _build(work: Work, run: Run, variant: Variant, corpora: Artifact, precision: Precision, device: str) -> None:
    from prosparse_core import predictor as predictors
    from prosparse_core.families import find_ffns
    from prosparse_core.prediction.cutoff import active_scores
    from prosparse_core.variants import load_variant

    section, seed = run.recipe.predictor, run.recipe.seed
    model, tokenizer = load_variant(variant, device)
    num_layers = len(find_ffns(model))
    total = num_layers / (1 - RECORDING_SHARE - PERPLEXITY_SHARE)
    trained_at = total * RECORDING_SHARE
    training, testing, choosing = _record(work, run, model, tokenizer, corpora, precision, total)
    starts = _starts(model, section, seed)

    def one_layer(layer: int) -> tuple[LayerPredictor, list[CutoffMetrics], Tensor | None]:
        if predictors.layer_file(work.folder, layer).is_file():  # of an interrupted attempt at this very step
            trained = predictors.load(work.folder, layer)
        else:
            trained = predictors.train(
                training.layers[layer],
                hidden=section.hidden,
                epochs=section.epochs,
                batch_size=section.batch_size,
                lr=section.lr,
                seed=seed,
                device=device,
                labels=section.labels,
                negative_weight=None if section.negative_weight == "density" else float(section.negative_weight),
                start=starts[layer] if starts else None,
            )
            predictors.save(trained, work.folder, layer)
        scores = active_scores(trained, choosing.layers[layer], section.labels, device) if choosing else None
        return trained, predictors.evaluate(trained, testing.layers[layer], section.cutoffs, device), scores

    work.fact("variants", **variant.fact(run.recipe.model.id))
    found, trained, scores = [], [], []
    for layer, (one, metrics_per_cutoff, counts) in enumerate(_side_by_side(one_layer, num_layers, device)):
        found.append(metrics_per_cutoff)
        trained.append(one)
        scores.append(counts)
        for metrics in metrics_per_cutoff:
            write_facts(work, variant, section, layer, metrics)
        head = metrics_per_cutoff[_headline(section.cutoffs)]
        work.progress.update(
            trained_at + layer + 1,
            total,
            layer=layer,
            recall="n/a" if head.recall is None else head.recall,
            predicted_sparsity=head.predicted_sparsity,
            sparsity=head.true_sparsity,
        )
    per_cutoff = [mean_over_layers([layer[i] for layer in found]) for i in range(len(section.cutoffs))]
    if idle := per_cutoff[0]["layers_without_active"]:
        work.progress.note(f"{idle} layers have no active neuron at all: recall is the mean over the others")
    chosen = choose(section, trained, scores, testing, device) if choosing else None
    windows = held_out_tokens(
        corpora.path, tokenizer, section.test_tokens, attend_across=run.recipe.data.attend_across_documents
    )
    entries = [*per_cutoff, *([chosen] if chosen else [])]
    for i, measured in enumerate(
        measure_perplexity(work, run, variant, model, windows, precision, trained, entries), start=1
    ):
        done = trained_at + num_layers + i / (len(entries) + 1) * PERPLEXITY_SHARE * total
        work.progress.update(min(done, total), total, perplexity=measured)
    work.meta.update(per_cutoff[_headline(section.cutoffs)])
    work.meta.update(
        per_cutoff=per_cutoff,
        chosen=chosen,
        hidden=section.hidden,
        input=section.input,
        label_rule=section.labels,
        top_share=section.top_share,
        train_tokens=training.num_tokens,
        num_tokens=testing.num_tokens,
    )
    shutil.rmtree(work.folder / RECORDINGS)


def _record(
    work: Work, run: Run, model: Any, tokenizer: Any, corpora: Artifact, precision: Precision, total: float
) -> tuple[Recording, Recording, Recording | None]:
    """Training text, evaluation files, and calibration files where cutoffs are chosen on them; kept on the disk."""
    from prosparse_core.document_masks import Packed
    from prosparse_core.mixing import Mixture
    from prosparse_core.prediction.recording import calibration_windows, held_out_windows, record

    section = run.recipe.predictor
    across = run.recipe.data.attend_across_documents
    mixture = Mixture(corpora.path, run.recipe.seed, work.folder, attend_across=across)
    training = (mixture.batch(i, WINDOWS_PER_FORWARD) for i in itertools.count(1))
    plan: list[tuple[str, Iterator[Packed], int]] = [
        ("training text", (Packed(batch.tokens, batch.positions) for batch in training), section.train_tokens),
        ("held-out text", (window for _, window in held_out_windows(mixture, tokenizer)), section.test_tokens),
    ]
    if section.target_recall is not None:
        plan.append(("calibration text", (window for _, window in calibration_windows(mixture)), section.test_tokens))
    whole, before = sum(asked for _, _, asked in plan), 0

    def watched(batches: Iterator[Packed], what: str, done: int) -> Iterator[Packed]:
        for batch in batches:
            yield batch
            done += batch.tokens.numel()
            work.progress.update(min(done / whole, 1.0) * RECORDING_SHARE * total, total, recording=what)

    recordings = []
    for what, batches, asked in plan:
        found = record(
            model,
            watched(batches, what, before),
            num_tokens=asked,
            precision=precision,
            source=section.input,
            top_share=section.top_share,
            folder=work.folder / RECORDINGS / what.split()[0],
        )
        if found.num_tokens < asked:
            work.progress.note(f"the {what} has {found.num_tokens} tokens, {asked} were asked")
        recordings.append(found)
        before += asked
    mixture.close()
    return recordings[0], recordings[1], recordings[2] if len(recordings) > 2 else None


def _starts(model: Any, section: Predictor, seed: int) -> list[LayerPredictor] | None:
    """Where every layer's predictor begins; None for random weights."""
    if section.init == "random":
        return None
    import torch

    from prosparse_core.families import find_ffns
    from prosparse_core.prediction.input import norm_before, norm_scale
    from prosparse_core.prediction.start import svd_predictor
    from prosparse_core.predictor import layer_seed

    def channels(ffn: FFN) -> Tensor | None:
        return norm_scale(norm_before(model, ffn), ffn.d_model, model.device) if section.input == "pre_norm" else None

    return [
        svd_predictor(
            ffn.act_weight,
            section.hidden,
            channels=channels(ffn),
            generator=torch.Generator().manual_seed(layer_seed(seed, ffn.layer)),
        )
        for ffn in find_ffns(model)
    ]


def _side_by_side(one_layer: Callable[[int], T], num_layers: int, device: str) -> Iterator[T]:
    """The layers' results in order; on a CPU as many layers at a time as torch has threads, each on one thread.

    A predictor is too small for several threads to share; and so they add nothing of their own to its weights.
    """
    import torch

    before = torch.get_num_threads()
    workers = before if device == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(one_layer, range(num_layers))
    finally:
        torch.set_num_threads(before)


def _headline(cutoffs: Sequence[float]) -> int:
    return min(range(len(cutoffs)), key=lambda i: abs(cutoffs[i] - HEADLINE_CUTOFF))
