"""predictor: an activation predictor per layer, trained on training text, measured on held-out text (App. C and F)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.step import Run, Work

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse_core.predictor import CutoffMetrics

T = TypeVar("T")
VERSION = 1
WINDOWS_PER_FORWARD = 4
HEADLINE_CUTOFF = 0.5
"""A probability of one half: what inference engines use. The nearest cutoff of the recipe is the headline."""
RECORDING_SHARE = 0.4
"""Of the step's time, for the progress bar."""


def predictor(run: Run, variant: Variant, corpora: Artifact) -> Artifact:
    """The artifact with ``layer_<i>.safetensors`` for every layer; its meta holds the means over layers per cutoff."""
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    section = run.recipe.predictor
    return run.step(
        "predictor",
        f"predictor · {variant.setting}, hidden {section.hidden}",
        lambda work: _build(work, run, variant, corpora, precision, device),
        version=VERSION,
        config={"predictor": section.model_dump(mode="json"), "variant": variant.identity, "precision": precision},
        inputs={**variant.inputs, "corpora": corpora},
    )


def _build(work: Work, run: Run, variant: Variant, corpora: Artifact, precision: Precision, device: str) -> None:
    from prosparse_core import predictor as predictors
    from prosparse_core.mixing import Mixture
    from prosparse_core.recording import held_out_windows, record
    from prosparse_core.variants import load_variant

    section, seed = run.recipe.predictor, run.recipe.seed
    model, tokenizer = load_variant(variant, device)
    mixture = Mixture(corpora.path, seed)
    num_layers = model.config.num_hidden_layers
    total = num_layers / (1 - RECORDING_SHARE)
    per_token = (total - num_layers) / (section.train_tokens + section.test_tokens)

    def watched(batches: Iterator[Tensor], before: int, what: str) -> Iterator[Tensor]:
        for tokens in batches:
            yield tokens
            before += tokens.numel()
            work.progress.update(min(before * per_token, total - num_layers), total, recording=what)

    train_batches = (mixture.batch(i, WINDOWS_PER_FORWARD).tokens for i in itertools.count(1))
    test_batches = (tokens for _, tokens in held_out_windows(mixture, tokenizer))
    training = record(
        model, watched(train_batches, 0, "training text"), num_tokens=section.train_tokens, precision=precision
    )
    testing = record(
        model,
        watched(test_batches, section.train_tokens, "held-out text"),
        num_tokens=section.test_tokens,
        precision=precision,
    )
    if testing.num_tokens < section.test_tokens:
        work.progress.note(f"the held-out text has {testing.num_tokens} tokens, {section.test_tokens} were asked")
    del model

    def one_layer(layer: int) -> list[CutoffMetrics]:
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
            )
            predictors.save(trained, work.folder, layer)
        return predictors.evaluate(trained, testing.layers[layer], section.cutoffs, device)

    work.fact("variants", **variant.fact(run.recipe.model.id))
    found: list[list[CutoffMetrics]] = []
    for layer, metrics_per_cutoff in enumerate(_side_by_side(one_layer, num_layers, device)):
        found.append(metrics_per_cutoff)
        for metrics in metrics_per_cutoff:
            work.fact(
                "predictors",
                variant=variant.id,
                layer=layer,
                cutoff=metrics.cutoff,
                hidden=section.hidden,
                label_rule=predictors.LABEL_RULE,
                recall=metrics.recall,
                predicted_sparsity=metrics.predicted_sparsity,
                true_sparsity=metrics.true_sparsity,
                num_tokens=metrics.num_tokens,
            )
        head = found[-1][_headline(section.cutoffs)]
        work.progress.update(
            total - num_layers + layer + 1,
            total,
            layer=layer,
            recall="n/a" if head.recall is None else head.recall,
            predicted_sparsity=head.predicted_sparsity,
            sparsity=head.true_sparsity,
        )
    per_cutoff = [_mean_over_layers([layer[i] for layer in found]) for i in range(len(section.cutoffs))]
    if idle := per_cutoff[0]["layers_without_active"]:
        work.progress.note(f"{idle} layers have no active neuron at all: recall is the mean over the others")
    work.meta.update(per_cutoff[_headline(section.cutoffs)])
    work.meta.update(
        per_cutoff=per_cutoff,
        hidden=section.hidden,
        label_rule=predictors.LABEL_RULE,
        train_tokens=training.num_tokens,
        num_tokens=testing.num_tokens,
    )


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


def _mean_over_layers(layers: Sequence[CutoffMetrics]) -> dict[str, Any]:
    """The paper's averages. Recall is None where no layer has an active neuron: it is undefined there, not 0."""
    recalls = [m.recall for m in layers if m.recall is not None]
    return {
        "cutoff": layers[0].cutoff,
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "predicted_sparsity": sum(m.predicted_sparsity for m in layers) / len(layers),
        "true_sparsity": sum(m.true_sparsity for m in layers) / len(layers),
        "layers_without_active": len(layers) - len(recalls),
    }
