"""substitute: ReLU in place of the dense activation, and the cliff it falls off before any training (paper, 3.1)."""

from __future__ import annotations

from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.step import Run, Work

VERSION = 4
CLIFF_TOKENS = 2048
"""Of each corpus: the fall is by a factor of thousands."""


def substitute(run: Run, dense: Artifact, corpora: Artifact) -> Artifact:
    """The artifact that says how many activations were swapped, and perplexity and sparsity before and after."""
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    return run.step(
        "substitute",
        "substitute · ReLU for the dense activation",
        lambda work: _build(work, run, dense, corpora, precision, device),
        version=VERSION,
        config={
            "activation": "relu",
            "precision": precision,
            "batch_size": run.recipe.evaluate.batch_size,
            "attend_across_documents": run.recipe.data.attend_across_documents,
        },
        inputs={"dense": dense, "corpora": corpora},
    )


def _build(work: Work, run: Run, dense: Artifact, corpora: Artifact, precision: Precision, device: str) -> None:
    from prosparse_core.mixing import Mixture
    from prosparse_core.perplexity import measure
    from prosparse_core.substitute import use_relu
    from prosparse_core.variants import load_variant

    mixture = Mixture(corpora.path, run.recipe.seed, attend_across=run.recipe.data.attend_across_documents)
    original = Variant("original", dense, "original")
    model, _ = load_variant(original, device)
    cliff: dict[str, dict[str, float]] = {}
    variants = [original, Variant("substituted", dense, "relu")]
    done, total = 0, 2 * len(mixture.corpora)
    for variant in variants:
        if variant.activation == "relu":
            work.meta["swapped"] = use_relu(model)
        work.fact("variants", **variant.fact(run.recipe.model.id))
        for corpus in mixture.corpora:
            batch, some = mixture.calibration(corpus), slice(max(1, CLIFF_TOKENS // mixture.seq_len))
            found = measure(
                model,
                batch.tokens[some],
                batch.labels[some],
                None if batch.positions is None else batch.positions[some],
                precision=precision,
                batch_size=run.recipe.evaluate.batch_size,
            )
            done += 1
            work.progress.update(done, total, perplexity=found.perplexity, sparsity=found.sparsity)
            cliff.setdefault(variant.setting, {})[corpus] = found.perplexity
            work.fact(
                "evaluations",
                variant=variant.id,
                task=f"calibration/{corpus}",
                corpus=corpus,
                metric="token_perplexity",
                value=found.perplexity,
                n=found.num_tokens,
                batch_size=run.recipe.evaluate.batch_size,
                dtype=precision,
                higher_is_better=False,
            )
    work.meta["perplexity"] = cliff
