"""What predictors are worth: recall against both label rules, the cutoff for a target, and the price in perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.precision import Precision
from prosparse_core.recipe import Predictor
from prosparse_core.variants import Variant
from tasks.step import Run, Work

if TYPE_CHECKING:
    from prosparse_core.document_masks import Packed
    from prosparse_core.prediction.recording import Recording
    from prosparse_core.predictor import CutoffMetrics, LayerPredictor


def write_facts(work: Work, variant: Variant, section: Predictor, layer: int, metrics: CutoffMetrics) -> None:
    """One row against each label rule; the rule it did not learn is named beside the one it did."""
    top = f"top_p {section.top_share:g}"
    learnt = "nonzero" if section.labels == "nonzero" else top
    for rule, recall, sparsity in (
        ("nonzero", metrics.recall, metrics.true_sparsity),
        (top, metrics.top_recall, metrics.top_sparsity),
    ):
        work.fact(
            "predictors",
            variant=variant.id,
            layer=layer,
            cutoff=metrics.cutoff,
            hidden=section.hidden,
            label_rule=rule if rule == learnt else f"{learnt}, against {rule}",
            recall=recall,
            predicted_sparsity=metrics.predicted_sparsity,
            true_sparsity=sparsity,
            num_tokens=metrics.num_tokens,
        )


def choose(
    section: Predictor, trained: Sequence[LayerPredictor], scores: Sequence[Any], testing: Recording, device: str
) -> dict[str, Any]:
    """The cutoffs that reach the target on calibration text, and what they come to on evaluation text."""
    from prosparse_core.prediction.cutoff import cutoff_per_layer, global_cutoff
    from prosparse_core.predictor import evaluate

    assert section.target_recall is not None
    if section.cutoff_scope == "layer":
        cutoffs = cutoff_per_layer(scores, section.target_recall)
    else:
        cutoffs = [global_cutoff(scores, section.target_recall)] * len(scores)
    layers = [
        evaluate(one, recording, [cutoff], device)[0]
        for one, recording, cutoff in zip(trained, testing.layers, cutoffs, strict=True)
    ]
    means = mean_over_layers(layers)
    means.pop("cutoff")
    return {
        "target_recall": section.target_recall,
        "scope": section.cutoff_scope,
        "cutoffs": cutoffs,
        **means,
        "layers": [
            {"recall": m.recall, "top_recall": m.top_recall, "predicted_sparsity": m.predicted_sparsity} for m in layers
        ],
    }


def held_out_tokens(corpora: Path, tokenizer: Any, num_tokens: int, *, attend_across: bool = False) -> list[Packed]:
    """The first windows of the evaluation files, each [1, length], until they have ``num_tokens``."""
    from prosparse_core.mixing import Mixture
    from prosparse_core.prediction.recording import held_out_windows

    found: list[Packed] = []
    for _, window in held_out_windows(Mixture(corpora, 0, attend_across=attend_across), tokenizer):
        if sum(w.tokens.numel() for w in found) >= num_tokens:
            break
        if window.tokens.shape[1] > 1:
            found.append(window)
    return found


def measure_perplexity(
    work: Work,
    run: Run,
    variant: Variant,
    model: Any,
    windows: Sequence[Packed],
    precision: Precision,
    trained: Sequence[LayerPredictor],
    entries: Sequence[dict[str, Any]],
) -> Iterator[float]:
    """The perplexity with every neuron, then with what the predictors leave at the cutoff (or cutoffs) of each entry.

    Each entry gets its ``perplexity`` and the ``sparsity_left`` of x1; meta gets ``exact_perplexity``.
    """
    from contextlib import nullcontext

    from prosparse_core.prediction.mask import PredictedMask, measure_windows

    exact: dict[str, Any] = {}
    for entry in [exact, *entries]:
        cutoffs = entry.get("cutoffs") or [entry.get("cutoff")] * len(trained)
        open_mask = PredictedMask(model, trained, cutoffs, run.recipe.predictor.input) if entry else nullcontext()
        with open_mask:
            measured = measure_windows(model, windows, precision)
        name = _name(entry)
        entry.update(perplexity=measured.perplexity, sparsity_left=measured.sparsity)
        work.fact(
            "evaluations",
            variant=variant.id,
            task=f"predictor/{name}",
            corpus="mixed",
            metric="predicted_perplexity",
            value=measured.perplexity,
            n=measured.num_tokens,
            dtype=precision,
            higher_is_better=False,
            note=f"sparsity of x1 {measured.sparsity:.4f}; the first windows of the evaluation files",
        )
        yield measured.perplexity
    work.meta.update(exact_perplexity=exact["perplexity"])


def _name(entry: dict[str, Any]) -> str:
    if "target_recall" in entry:
        return f"recall {entry['target_recall']:g}, by {entry['scope']}"
    return f"cutoff {entry['cutoff']:g}" if entry else "exact"


def mean_over_layers(layers: Sequence[CutoffMetrics]) -> dict[str, Any]:
    """The paper's averages. Recall is None where no layer has an active neuron: it is undefined there, not 0."""
    recalls = [m.recall for m in layers if m.recall is not None]
    of_top = [m.top_recall for m in layers if m.top_recall is not None]
    return {
        "cutoff": layers[0].cutoff,
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "top_recall": sum(of_top) / len(of_top) if of_top else None,
        "predicted_sparsity": sum(m.predicted_sparsity for m in layers) / len(layers),
        "true_sparsity": sum(m.true_sparsity for m in layers) / len(layers),
        "layers_without_active": len(layers) - len(recalls),
    }
