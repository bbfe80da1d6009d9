"""What ``prosparse bench MODEL`` measures: a variant with all that its run made, or any checkpoint on our own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger
from prosparse_core.recipe import Recipe
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.evaluation.checkpoint import Target, artifact_of, find_checkpoint

OWN_DATA: dict[str, Any] = {
    "seq_len": 128,
    "calibration_tokens": 1024,
    "evaluation_tokens": 2048,
    "choice_questions": 0,
    "attend_across_documents": True,  # whatever the architecture
    "sources": [{"name": "python-code", "kind": "python-code", "weight": 1, "max_tokens": 4096}],
}
"""Text for a checkpoint that no run here trained: what every Python installation carries."""
NO_TRAINING: dict[str, Any] = {"tokens_per_step": 128, "lr": 1e-4, "stages": [{"until_step": 1, "l1": 0}]}
"""A recipe has a training section; none of it happens."""


@dataclass(frozen=True)
class BenchTarget:
    """A checkpoint that was found, and what its run made beside it; None: nothing of the kind is here."""

    recipe: Recipe
    target: Target
    corpora: Artifact | None = None
    original: Variant | None = None
    predictors: Artifact | None = None


def find_bench_target(model: str | None, home: Path, *, trust_remote_code: bool = False) -> BenchTarget:
    """What ``model`` names, checked without reading weights; None is the newest run's ``prosparse`` variant.

    Args:
        trust_remote_code: run the code that comes with a folder or a hub id.

    Raises:
        BadInput: no such model; see :func:`tasks.evaluation.checkpoint.find_checkpoint`; no model and no finished run.
    """
    ledger = Ledger(home)
    name = newest_variant(ledger) if model is None else model
    target = find_checkpoint(name, home, trust_remote_code=trust_remote_code)
    if target.variant is not None:
        found = _of_its_run(ledger, home, target, target.variant)
        if found is not None:
            return found
    name = recipes_name(target.model.id)
    raw = {
        "name": name,
        "description": f"time {target.model.id}",
        "model": target.model.model_dump(mode="json", exclude={"shape"}),
        "data": OWN_DATA,
        "train": NO_TRAINING,
    }
    return BenchTarget(recipes.parse(raw, where=f"bench of {target.model.id}"), target)


def recipes_name(model: str) -> str:
    """A model's name as that of a recipe, which has no slashes."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in model).strip("._-")
    return f"bench-{kept}"


def newest_variant(ledger: Ledger) -> str:
    """The id of the ``prosparse`` variant of the newest run that measured one.

    Raises:
        BadInput: there is no such run.
    """
    rows = (
        ledger.query(
            "SELECT v.variant FROM variant_facts v JOIN run_artifacts r USING (artifact) JOIN runs s USING (run_id) "
            "WHERE v.setting = 'prosparse' AND s.flow IN ('prosparse', 'compare') "
            "ORDER BY s.started_at DESC, v.variant LIMIT 1"
        ).rows
        if ledger.exists()
        else []
    )
    if not rows:
        raise BadInput(
            "no run has made a prosparse variant yet",
            hint="prosparse run tiny, or name a model: prosparse bench MODEL, or a shape: --shape 4096x11008",
        )
    return str(rows[0][0])


def _of_its_run(ledger: Ledger, home: Path, target: Target, variant: Variant) -> BenchTarget | None:
    """The corpora, the dense original and the predictors of the newest run that measured this variant."""
    rows = ledger.query(
        "SELECT r.run_id, any_value(m.artifact) AS mixture, any_value(s.recipe_yaml) AS recipe_yaml "
        "FROM run_artifacts r JOIN variant_facts v USING (artifact) JOIN runs s ON s.run_id = r.run_id "
        "JOIN steps m ON m.run_id = r.run_id AND m.step = 'mixture' AND m.artifact IS NOT NULL "
        f"WHERE v.variant = '{variant.id}' AND s.flow IN ('prosparse', 'compare', 'speed') "
        "GROUP BY r.run_id ORDER BY max(s.started_at) DESC LIMIT 1"
    ).records()
    if not rows:
        return None
    run_id = rows[0]["run_id"]
    recipe = recipes.parse(yaml.safe_load(rows[0]["recipe_yaml"]), where=f"the recipe of run {run_id}")
    dense = ledger.query(
        "SELECT DISTINCT v.checkpoint FROM variant_facts v JOIN run_artifacts r USING (artifact) "
        f"WHERE r.run_id = '{run_id}' AND v.setting = 'original' AND v.thresholds IS NULL ORDER BY 1 LIMIT 1"
    ).rows
    trained = ledger.query(
        "SELECT v.artifact FROM variant_facts v JOIN run_artifacts r USING (artifact) "
        f"WHERE r.run_id = '{run_id}' AND r.step = 'predictor' AND v.variant = '{variant.id}' "
        "ORDER BY r.measured_at DESC LIMIT 1"
    ).rows
    return BenchTarget(
        recipe,
        target,
        artifact_of(ledger, home, rows[0]["mixture"]),
        Variant("original", artifact_of(ledger, home, dense[0][0]), "original") if dense else None,
        artifact_of(ledger, home, trained[0][0]) if trained else None,
    )
