"""mixture: the corpora as packed training windows, and held-out files for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prosparse_core.families import require_family
from prosparse_core.family import way_of
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_mixture import trained_corpora
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL, check_folder
from tasks.step import Run, Work

VERSION = 4
UNCOUNTED: Any = {"attend_across_documents": True, "mirror": True, "sources": {"__all__": {"mirror"}}}
"""Keys of ``data`` that do not decide the mixture: how windows are read, and where text lies (what it is says the
identity of each source)."""


def mixture(run: Run, dense: Artifact) -> Artifact:
    """The artifact with tokens per corpus and split; its ``manifest.json`` says how much there is of each.

    Raises:
        BadInput: see :func:`require_documents_apart`.
    """
    from prosparse_core.data.sources import source_identity

    if dense.folder is not None:
        require_documents_apart(run.recipe, check_folder(dense.folder / MODEL))
    data = run.recipe.data
    artifact = run.step(
        "mixture",
        "mixture · " + ", ".join(s.name for s in data.sources),
        lambda work: _build(work, run, dense),
        version=VERSION,
        config={
            "data": data.model_dump(mode="json", exclude=UNCOUNTED),
            "identity": {s.name: source_identity(s) for s in data.sources},
            "trained": trained_corpora({s.name: s.weight for s in data.sources}, run.recipe.train.stages),
        },
        inputs={"dense": dense},
        needs_bytes=sum(s.max_tokens for s in data.sources) * 8,
    )
    if artifact.folder is not None:
        from prosparse_core.data.stream import tell_mirrors

        tell_mirrors(artifact.folder, data.sources)
    return artifact


def require_documents_apart(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse an architecture whose attention cannot keep the documents of a window apart, unless the recipe lets them
    attend to each other.

    Raises:
        BadInput: it is one; the hint names the option.
    """
    if not recipe.data.attend_across_documents:
        way_of(config, require_family(config, where="model"))


def _build(work: Work, run: Run, dense: Artifact) -> None:
    from prosparse_core.mixing import prepare
    from prosparse_core.variants import load_tokenizer

    recipe = run.recipe
    manifest = prepare(
        recipe.data,
        load_tokenizer(dense.path / MODEL),
        work.folder,
        seed=recipe.seed,
        stages=recipe.train.stages,
        processes=recipe.runtime.data_processes,
        progress=work.progress,
    )
    work.meta.update(manifest)
