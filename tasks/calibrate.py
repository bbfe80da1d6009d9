"""calibrate: the FATReLU curve and the largest thresholds within the perplexity budget (paper, section 3.3)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput
from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.store import Artifact, write_json
from prosparse_core.thresholds import THRESHOLDS
from prosparse_core.variants import Variant
from tasks.step import Run, Work

if TYPE_CHECKING:
    from prosparse_core.calibration import Curve
    from prosparse_core.perplexity import Measured

    Measure = Callable[[Sequence[float]], dict[str, Measured]]

VERSION = 6
CETT_TOKENS = 512
"""Calibration tokens on which each layer's CETT is measured."""
SCOPES = {"grid": "global", "cett": "per_layer"}


def calibrate(run: Run, variant: Variant, corpora: Artifact, note: str = "") -> Artifact:
    """The artifact with ``thresholds.json`` and the whole curve, measured on calibration files only.

    thresholds.json: ``per_layer`` is what the variant runs with, ``threshold`` the best one for all layers together
    (the same, unless the rule is cett), ``checkpoint`` the digest of the model they belong to. The budget is relative
    to the perplexity at threshold 0, so that it cannot be exceeded there already.

    Raises:
        BadInput: the variant does not run ReLU: FATReLU would silently replace another activation.
    """
    if variant.activation != "relu":
        raise BadInput(
            f"{variant.setting} runs {variant.activation}: FATReLU thresholds are for a model that runs ReLU",
            hint="calibrate a variant that was trained with activation: relu",
        )
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    section = run.recipe.calibrate
    what = "threshold" if section.rule == "grid" else "thresholds"
    return run.step(
        "calibrate",
        f"calibrate · {what} for at most +{section.max_ppl_increase_pct:g} % perplexity"
        + (f" · {note}" if note else ""),
        lambda work: _build(work, run, variant, corpora, precision, device),
        version=VERSION,
        config={
            "calibrate": section.model_dump(mode="json"),
            "variant": variant.identity,
            "precision": precision,
            "batch_size": run.recipe.evaluate.batch_size,
            "attend_across_documents": run.recipe.data.attend_across_documents,
        },
        inputs={**variant.inputs, "corpora": corpora},
    )


def _build(work: Work, run: Run, variant: Variant, corpora: Artifact, precision: Precision, device: str) -> None:
    from prosparse_core.calibration import CETTS, calibrate, calibrate_cett
    from prosparse_core.cett import measure_cett, thresholds_at
    from prosparse_core.families import find_ffns
    from prosparse_core.mixing import Mixture
    from prosparse_core.perplexity import measure
    from prosparse_core.substitute import use_thresholds
    from prosparse_core.variants import load_variant

    section, recipe = run.recipe.calibrate, run.recipe
    mixture = Mixture(corpora.path, recipe.seed, attend_across=recipe.data.attend_across_documents)
    batches = {corpus: mixture.calibration(corpus) for corpus in mixture.corpora}
    windows = {corpus: (batch.tokens, batch.labels, batch.positions) for corpus, batch in batches.items()}
    _require_windows(windows, corpora)
    model, _ = load_variant(variant, device)
    settings: dict[str, Any] = {"precision": precision, "batch_size": recipe.evaluate.batch_size}
    total = len(section.thresholds) + section.refine + (0 if section.rule == "grid" else len(CETTS) + section.refine)
    tried = 0

    def at(thresholds: Sequence[float]) -> dict[str, Measured]:
        nonlocal tried
        use_thresholds(model, thresholds)
        found = {
            corpus: replace(measure(model, *window, **settings), share=mixture.shares[corpus])
            for corpus, window in windows.items()
        }
        tried += 1
        first, mean = next(iter(found.values())), sum(thresholds) / len(thresholds)
        work.progress.update(
            min(tried, total), total, threshold=mean, perplexity=first.perplexity, sparsity=first.sparsity
        )
        return found

    budget = section.max_ppl_increase_pct
    grid = calibrate(lambda t: at([t]), section.thresholds, budget, section.refine)
    curves = {"grid": grid}
    if section.rule != "grid":
        tried = len(section.thresholds) + section.refine
        use_thresholds(model, [0.0])
        layers = measure_cett(model, list(windows.values()), num_tokens=CETT_TOKENS, **settings)
        curves["cett"] = calibrate_cett(
            at, lambda cett: thresholds_at(layers, cett), grid.trials[0], budget, section.refine
        )
    rule = max(curves, key=lambda name: curves[name].best.mixed.sparsity) if section.rule == "best" else section.rule
    work.progress.update(total, total, threshold=curves[rule].chosen)
    work.progress.note(_ending(curves[rule]))
    _record(work, run, variant, curves, rule, len(find_ffns(model)))


def _require_windows(windows: dict[str, Any], corpora: Artifact) -> None:
    empty = [corpus for corpus, (tokens, _, _) in windows.items() if not len(tokens)]
    if empty or not windows:
        of = f"of {', '.join(empty)}" if empty else "without a corpus"
        raise BadInput(
            f"the calibration split {of} in {corpora.path} is smaller than one window",
            hint="raise data.calibration_tokens to at least data.seq_len",
        )


def _record(work: Work, run: Run, variant: Variant, curves: dict[str, Curve], rule: str, num_layers: int) -> None:
    """Write every trial of every rule as facts, the chosen thresholds as thresholds.json and, but for them, as meta."""
    from prosparse_core.calibration import MIXED

    work.fact("variants", **variant.fact(run.recipe.model.id))
    for name, curve in curves.items():
        for trial in curve.trials:
            for corpus, found in {**trial.per_corpus, MIXED: trial.mixed}.items():
                work.fact(
                    "thresholds",
                    variant=variant.id,
                    rule=name,
                    scope=SCOPES[name],
                    threshold=trial.threshold,
                    corpus=corpus,
                    num_tokens=found.num_tokens,
                    perplexity=found.perplexity,
                    sparsity=found.sparsity,
                    chosen=name == rule and trial is curve.best,
                    cett=trial.cett,
                    stopped_by=curve.stopped_by,
                )
    grid, curve = curves["grid"], curves[rule]
    result: dict[str, Any] = {
        "rule": rule,
        "scope": SCOPES[rule],
        "threshold": grid.chosen,
        "mean_threshold": curve.chosen,
        "per_layer": list(curve.best.per_layer or [curve.chosen] * num_layers),
        "cett": curve.best.cett,
        "checkpoint": variant.checkpoint.digest,
        "max_ppl_increase_pct": curve.max_ppl_increase_pct,
        "window_tokens": run.recipe.data.seq_len,
        **_outcome(curve),
        "global": {"threshold": grid.chosen, **_outcome(grid)},
    }
    write_json(work.folder / THRESHOLDS, result)
    work.meta.update({k: v for k, v in result.items() if k != "per_layer"})
    per_layer = curves.get("cett")
    if per_layer is not None and per_layer.best.mixed.sparsity < grid.best.mixed.sparsity:
        work.meta["remark"] = _why_not(per_layer, grid, rule)
        work.progress.note(work.meta["remark"])


def _ending(curve: Curve) -> str:
    """What the search used of its budget, and what ended it."""
    used = f"{curve.increase_pct(curve.best):+.2f} % of the +{curve.max_ppl_increase_pct:g} % allowed are used"
    if curve.stopped_by == "budget":
        return f"{used}: a larger threshold would exceed the budget"
    return f"{used}: larger thresholds bring no more sparsity than {100 * curve.best.mixed.sparsity:.2f} %"


def _why_not(curve: Curve, grid: Curve, rule: str) -> str:
    """What to say when one threshold for all layers does better than one for each."""
    per_layer = curve.best.per_layer or ()
    median, largest = statistics.median(per_layer), sorted(range(len(per_layer)), key=lambda i: -per_layer[i])[:2]
    named = " and ".join(f"layer {i} ({per_layer[i]:.3g})" for i in largest)
    return (
        f"one threshold per layer reaches {100 * curve.best.mixed.sparsity:.2f} % sparsity within the budget of "
        f"+{curve.max_ppl_increase_pct:g} %, one for all layers ({grid.chosen:.3g}) "
        f"{100 * grid.best.mixed.sparsity:.2f} %: here an equal share of a layer's output does not cost the same "
        f"everywhere; it gives {named} the largest thresholds, the median being {median:.3g}"
        + ("; calibrate.rule=grid takes the one for all layers" if rule == "cett" else "")
    )


def _outcome(curve: Curve) -> dict[str, Any]:
    """What the chosen trial of a curve costs and brings, on all corpora together, and what ended the search."""
    return {
        "stopped_by": curve.stopped_by,
        "ppl_increase_pct": curve.increase_pct(curve.best),
        "sparsity": curve.best.mixed.sparsity,
        "sparsity_gain": curve.sparsity_gain,
    }
