"""Which training led to what: a run may train many settings that share their beginnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prosparse_core.report.names import MAIN, order_of

Record = dict[str, Any]
Subjects = dict[str, list[Record]]


def main_path(subjects: Subjects, recipe_seed: Any = None, last: Any = None) -> list[Record]:
    """The log of one chain of stages: where a run trained several settings, that of ProSparse with the recipe's last
    factor and seed, or else of the paper's row nearest to it."""
    rows = subjects["training"]
    artifacts_of_stage: dict[Any, set[str]] = {}
    for row in rows:
        artifacts_of_stage.setdefault(row["stage"], set()).add(row["artifact"])
    if all(len(found) == 1 for found in artifacts_of_stage.values()):
        return rows
    ends = [c for c in subjects["checkpoints"] if c["checkpoint"] and c["setting"] in MAIN]
    if not ends:
        return rows

    def order(end: Record) -> tuple[Any, ...]:
        return (MAIN.index(end["setting"]), is_other(end.get("l1"), last), *seed_order(end.get("seed"), recipe_seed))

    end = min(ends, key=order)
    path = _ancestry(subjects["lineage"], end["checkpoint"])
    return [row for row in rows if row["artifact"] in path]


def courses(subjects: Subjects, recipe_seed: Any = None) -> list[Record]:
    """The training log of every checkpoint that was measured, from its first step: rows with setting, l1 and seed.

    Stages that several settings share stand under each of them. What is only the beginning of another course is left
    out, and a checkpoint measured twice (with thresholds and without) counts once.
    """
    by_artifact: dict[str, list[Record]] = {}
    for row in subjects["training"]:
        by_artifact.setdefault(row["artifact"], []).append(row)
    ends: dict[str, Record] = {}
    for end in sorted(subjects["checkpoints"], key=lambda c: order_of(c["setting"])):
        if end["checkpoint"] in by_artifact:
            ends.setdefault(end["checkpoint"], end)
    paths = {digest: _ancestry(subjects["lineage"], digest) & set(by_artifact) for digest in ends}
    kept = [digest for digest, path in paths.items() if not any(path < other for other in paths.values())]
    found: list[Record] = []
    for digest in sorted(kept, key=lambda d: course_order(ends[d], recipe_seed)):
        who = {key: ends[digest].get(key) for key in ("setting", "l1", "seed")}
        rows = [row for artifact in paths[digest] for row in by_artifact[artifact]]
        rows.sort(key=lambda r: (r["step"], r["stage"] or 0))
        found += [{**who, **{k: v for k, v in row.items() if k != "artifact"}} for row in rows]
    return found


def grouped(rows: Iterable[Record]) -> dict[tuple[str, Any, Any], list[Record]]:
    """The rows of :func:`courses` by (setting, l1, seed), in their order."""
    found: dict[tuple[str, Any, Any], list[Record]] = {}
    for row in rows:
        found.setdefault((row["setting"], row["l1"], row["seed"]), []).append(row)
    return found


def course_order(row: Record, recipe_seed: Any) -> tuple[Any, ...]:
    """By setting, then by factor, then the recipe's own seed before others."""
    l1 = row.get("l1")
    return (*order_of(row["setting"]), l1 is not None, l1 or 0.0, *seed_order(row.get("seed"), recipe_seed))


def last_factor(recipe: Record) -> Any:
    """Where lambda ends in a recipe's own stages, before an ending ``phase: sft``; None where it cannot be read."""
    train = recipe.get("train")
    stages = train.get("stages") if isinstance(train, dict) else None
    own = [s.get("l1") for s in stages or [] if isinstance(s, dict) and s.get("phase") != "sft"]
    return own[-1] if own else None


def is_other(l1: Any, own: Any) -> bool:
    """Whether a factor is not the recipe's own; sorts the recipe's before others."""
    return l1 is not None and l1 != own


def seed_order(seed: Any, recipe_seed: Any) -> tuple[bool, Any]:
    """Sorts the recipe's own seed before others."""
    return (seed is not None and seed != recipe_seed, seed or 0)


def _ancestry(lineage: list[Record], digest: str) -> set[str]:
    inputs: dict[str, list[str]] = {}
    for edge in lineage:
        inputs.setdefault(edge["artifact"], []).append(edge["input"])
    path: set[str] = set()
    todo = [digest]
    while todo:
        artifact = todo.pop()
        if artifact not in path:
            path.add(artifact)
            todo += inputs.get(artifact, [])
    return path
