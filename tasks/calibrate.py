"""calibrate: the FATReLU curve and the largest threshold within the perplexity budget (paper, section 3.3)."""

from __future__ import annotations

from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.store import Artifact, write_json
from prosparse_core.variants import THRESHOLDS, Variant
from tasks.step import Run, Work

VERSION = 2


def calibrate(run: Run, variant: Variant, corpora: Artifact) -> Artifact:
    """The artifact with ``thresholds.json`` (per layer) and the whole curve, measured on calibration files only."""
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    section = run.recipe.calibrate
    return run.step(
        "calibrate",
        f"calibrate · threshold for at most +{section.max_ppl_increase_pct:g} % perplexity",
        lambda work: _build(work, run, variant, corpora, precision, device),
        version=VERSION,
        config={
            "calibrate": section.model_dump(mode="json"),
            "variant": variant.identity,
            "precision": precision,
            "batch_size": run.recipe.evaluate.batch_size,
        },
        inputs={**variant.inputs, "corpora": corpora},
    )


def _build(work: Work, run: Run, variant: Variant, corpora: Artifact, precision: Precision, device: str) -> None:
    from prosparse_core.calibration import MIXED, calibrate, increase_pct
    from prosparse_core.mixing import Mixture
    from prosparse_core.perplexity import Measured, measure
    from prosparse_core.substitute import use_thresholds
    from prosparse_core.variants import load_variant

    section, recipe = run.recipe.calibrate, run.recipe
    model, _ = load_variant(variant, device)
    mixture = Mixture(corpora.path, recipe.seed)
    windows = {corpus: mixture.calibration(corpus) for corpus in mixture.corpora}
    total = len(section.thresholds) + section.refine
    tried = 0

    def at(threshold: float) -> dict[str, Measured]:
        nonlocal tried
        use_thresholds(model, [threshold])
        found = {
            corpus: measure(model, tokens, labels, precision=precision, batch_size=recipe.evaluate.batch_size)
            for corpus, (tokens, labels) in windows.items()
        }
        tried += 1
        first = next(iter(found.values()))
        work.progress.update(
            min(tried, total), total, threshold=threshold, perplexity=first.perplexity, sparsity=first.sparsity
        )
        return found

    curve = calibrate(at, section.thresholds, section.max_ppl_increase_pct, section.refine)
    work.progress.update(total, total, threshold=curve.chosen)
    work.fact("variants", **variant.fact(recipe.model.id))
    for trial in curve.trials:
        for corpus, found in {**trial.per_corpus, MIXED: trial.mixed}.items():
            work.fact(
                "thresholds",
                variant=variant.id,
                rule="grid",
                scope="global",
                threshold=trial.threshold,
                corpus=corpus,
                num_tokens=found.num_tokens,
                perplexity=found.perplexity,
                sparsity=found.sparsity,
                chosen=trial.threshold == curve.chosen,
            )
    chosen = next(t for t in curve.trials if t.threshold == curve.chosen)
    result = {
        "rule": "grid",
        "scope": "global",
        "threshold": curve.chosen,
        "per_layer": [curve.chosen] * model.config.num_hidden_layers,
        "max_ppl_increase_pct": curve.max_ppl_increase_pct,
        "ppl_increase_pct": increase_pct(chosen, curve.trials[0]),
        "sparsity_gain": chosen.mixed.sparsity - curve.trials[0].mixed.sparsity,
    }
    write_json(work.folder / THRESHOLDS, result)
    work.meta.update({k: v for k, v in result.items() if k != "per_layer"})
