"""mixture: the corpora as packed training windows, and held-out files for calibration and evaluation."""

from __future__ import annotations

from typing import Any

from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL
from tasks.step import Run, Work

VERSION = 2
PLACES: Any = {"mirror": True, "sources": {"__all__": {"mirror"}}}
"""Keys of ``data`` that say where text lies: what it is says the identity of each source."""


def mixture(run: Run, dense: Artifact) -> Artifact:
    """The artifact with tokens per corpus and split; its ``manifest.json`` says how much there is of each."""
    from prosparse_core.data.sources import source_identity

    data = run.recipe.data
    artifact = run.step(
        "mixture",
        "mixture · " + ", ".join(s.name for s in data.sources),
        lambda work: _build(work, run, dense),
        version=VERSION,
        config={
            "data": data.model_dump(mode="json", exclude=PLACES),
            "identity": {s.name: source_identity(s) for s in data.sources},
            "train_tokens": run.recipe.train.total_tokens,
        },
        inputs={"dense": dense},
        needs_bytes=sum(s.max_tokens for s in data.sources) * 8,
    )
    if artifact.folder is not None:
        from prosparse_core.data.stream import tell_mirrors

        tell_mirrors(artifact.folder, data.sources)
    return artifact


def _build(work: Work, run: Run, dense: Artifact) -> None:
    from prosparse_core.mixing import prepare
    from prosparse_core.variants import load_tokenizer

    recipe = run.recipe
    manifest = prepare(
        recipe.data,
        load_tokenizer(dense.path / MODEL),
        work.folder,
        seed=recipe.seed,
        train_tokens=recipe.train.total_tokens,
        processes=recipe.runtime.data_processes,
        progress=work.progress,
    )
    work.meta.update(manifest)
