"""export: the finished model as a Hugging Face folder, loaded again in a fresh process and measured there."""

from __future__ import annotations

import importlib.metadata
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.precision import resolve_device
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL, Variant
from tasks.step import Run, Work

if TYPE_CHECKING:
    from prosparse_core.export import Measurement

VERSION = 1
FOLDER = "hf"
"""The Hugging Face folder inside the artifact."""
MAX_TOKENS = 4096
"""Held-out tokens measured again after loading, all corpora together (at least one document of each)."""
MAX_RELATIVE_DIFFERENCE = 1e-3
SETTINGS = ("original", "vanilla_relu", "shifted_relu", "fixed_l1", "prosparse_star", "prosparse")
"""The order of the model card's columns; other settings follow by name."""


def export(run: Run, variant: Variant, measured: Artifact, corpora: Artifact) -> Artifact:
    """The artifact with the Hub-ready folder ``hf/``; its model card shows what this run measured, from the ledger.

    Raises:
        BadInput: the variant runs its original activation: there is nothing to export.
    """
    if variant.activation == "original":
        raise BadInput(
            f"{variant.setting} runs the model's original activation; only ReLU and FATReLU variants are exported",
            hint="use the dense model itself",
        )
    recipe = run.recipe
    checkpoint = variant.checkpoint.folder
    return run.step(
        "export",
        f"export · {variant.setting} · Hugging Face",
        lambda work: _build(work, run, variant, measured, corpora),
        version=VERSION,
        config={
            "variant": variant.identity,
            "model": [recipe.model.id, hub_id(recipe.model.source)],
            "recipe": recipe.name,
            "stages": [stage.model_dump(mode="json") for stage in recipe.train.stages],
            "max_tokens": MAX_TOKENS,
        },
        inputs={**variant.inputs, "measured": measured, "corpora": corpora},
        needs_bytes=sum(f.stat().st_size for f in (checkpoint / MODEL).glob("*.safetensors")) if checkpoint else 0,
    )


def _build(work: Work, run: Run, variant: Variant, measured: Artifact, corpora: Artifact) -> None:
    from prosparse_core.export import export_hf

    target = work.folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    work.progress.update(0, 3)
    card = model_card(run, variant, measured, corpora)
    export_hf(variant.checkpoint.path / MODEL, _thresholds(variant), target, card=card)
    work.progress.update(1, 3)
    perplexity = _measure_again(work, run, variant, measured, corpora, target)
    work.meta.update(folder=FOLDER, setting=variant.setting, perplexity=perplexity)


def _thresholds(variant: Variant) -> list[float]:
    """ReLU is FATReLU at threshold 0."""
    return variant.layer_thresholds() or [0.0]


def _measure_again(
    work: Work, run: Run, variant: Variant, measured: Artifact, corpora: Artifact, target: Path
) -> dict[str, float | None]:
    """Perplexity by corpus, in this process and after loading the folder in a fresh one, on the same documents.

    Raises:
        ProSparseError: the two differ by more than ``MAX_RELATIVE_DIFFERENCE``.
    """
    import torch

    from prosparse_core.variants import load_variant
    from tasks.export_check import in_fresh_process, token_perplexities

    before = measured.meta()
    device = resolve_device(run.recipe.runtime.device)
    model, tokenizer = load_variant(variant, device)
    request = {
        "held_out": str(corpora.path.resolve()),
        "precision": before["precision"],
        "batch_size": before["batch_size"],
        "max_length": before["max_length"],
        "limit": document_limit(corpora.path, tokenizer),
        "device": device,
        "num_threads": torch.get_num_threads(),
    }
    expected = token_perplexities(model, tokenizer, request)
    del model
    work.progress.update(2, 3)
    found = in_fresh_process(target, request)
    work.fact("variants", **variant.fact(run.recipe.model.id))
    for corpus, score in found.items():
        ours = expected[corpus]
        if score["n"] != ours["n"] or not agree(score["value"], ours["value"]):
            raise ProSparseError(
                f"the exported model has perplexity {score['value']} on {corpus} ({score['n']} tokens) after loading, "
                f"but {ours['value']} ({ours['n']} tokens) before the export",
                hint="the installed transformers loads this architecture differently; the export was not kept",
            )
        work.fact(
            "evaluations",
            variant=variant.id,
            task=f"exported/{corpus}",
            metric=score["metric"],
            value=score["value"],
            stderr=score["stderr"],
            n=score["n"],
            num_fewshot=0,
            limit=request["limit"] if score["partial"] else None,
            batch_size=request["batch_size"],
            dtype=request["precision"],
            harness_version=before["harness_version"],
            higher_is_better=False,
            note=f"after loading the export in a fresh process; {ours['value']} before; {score['note']}",
        )
    work.progress.update(3, 3)
    return {corpus: score["value"] for corpus, score in found.items()}


def agree(found: float | None, expected: float | None) -> bool:
    """Two perplexities within ``MAX_RELATIVE_DIFFERENCE``; None is one beyond the range of a double."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=MAX_RELATIVE_DIFFERENCE)


def document_limit(held_out: Path, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> int | None:
    """How many documents of each corpus keep within ``max_tokens`` in total: at least 1; None when all do."""
    from tasks.evaluation.held_out import read_held_out

    corpora = read_held_out(held_out, choice=False).corpora.values()
    sizes = [[len(tokenizer(f"{r['prompt'] or ''}{r['text']}")["input_ids"]) for r in rows] for rows in corpora]
    longest = max(map(len, sizes))
    fitting = [n for n in range(1, longest + 1) if sum(sum(s[:n]) for s in sizes) <= max_tokens]
    limit = max(fitting, default=1)
    return None if limit == longest else limit


def model_card(run: Run, variant: Variant, measured: Artifact, corpora: Artifact) -> str:
    """README.md of the export; every number is read from the ledger, the recipe or an artifact."""
    from prosparse_core.export import Card
    from prosparse_core.variants import check_folder

    conditions, recipe = measured.meta(), run.recipe
    return Card(
        model=recipe.model.id,
        base_model=hub_id(recipe.model.source),
        setting=variant.setting,
        config=check_folder(variant.checkpoint.path / MODEL),
        thresholds=_thresholds(variant),
        tokens_seen=variant.training["tokens_seen"],
        recipe=recipe.name,
        stages=[stage.model_dump(mode="json") for stage in recipe.train.stages],
        results=measurements(run),
        notes=[
            f"Measured with lm-eval {conditions['harness_version']} in {conditions['precision']}, windows of "
            f"{conditions['max_length']} tokens"
            + (f", at most {conditions['limit']} documents a corpus." if conditions["limit"] else ".")
        ],
        lineage={
            **{role: artifact.digest for role, artifact in variant.inputs.items()},
            "evaluation": measured.digest,
            "corpora": corpora.digest,
        },
        versions={name: _version(name) for name in ("prosparse", "torch", "transformers")},
    ).render()


def measurements(run: Run) -> list[Measurement]:
    """Perplexity and sparsity by setting and corpus, from the ledger: what the evaluate steps of this run measured."""
    from prosparse_core.export import Measurement

    run_id = run.run_id.replace("'", "''")
    table = run.ledger.query(
        "SELECT setting, kind, corpus_or_task AS corpus, value FROM results "
        f"WHERE run_id = '{run_id}' AND setting IS NOT NULL AND (kind, name) IN "
        "(('evaluation', 'token_perplexity'), ('sparsity', 'sparsity')) AND artifact IN "
        f"(SELECT artifact FROM steps WHERE run_id = '{run_id}' AND step = 'evaluate') "
        "ORDER BY setting, corpus, measured_at"
    )
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for setting, kind, corpus, value in table:
        found.setdefault(setting, {"evaluation": {}, "sparsity": {}})[kind][corpus] = value
    order = sorted(found, key=lambda s: (SETTINGS.index(s) if s in SETTINGS else len(SETTINGS), s))
    return [Measurement(s, found[s]["evaluation"], found[s]["sparsity"]) for s in order]


def hub_id(source: str) -> str | None:
    """The hub id in a recipe's ``model.source``, if it is one and no folder or file of that name is there."""
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.endswith(".gguf")
    return source if is_hub_id and not Path(source).exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
