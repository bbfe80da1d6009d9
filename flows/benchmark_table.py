"""Benchmarks side by side, as people read them: a line each, then the paper's averages; n/a with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.evaluation.benchmarks import BENCHMARKS, Average, averages

SOME_TASKS = re.compile(r"mean of (\d+ of \d+ tasks)")
Scores = Sequence[Mapping[str, Any]]
"""The ``benchmarks`` of an evaluate step: rows with task, metric, value, stderr, headline, partial, note, ..."""


def benchmark_table(measured: Mapping[str, Scores]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): one column per variant; with a single one its other scores beside the paper's.

    Args:
        measured: scores by the label of the variant.
    """
    alone = len(measured) == 1
    columns = ["benchmark", "shots", "score", *measured, *(["also"] if alone else [])]
    rows: list[list[Any]] = []
    for task in _tasks(measured):
        found = {label: [s for s in scores if s["task"] == task] for label, scores in measured.items()}
        first = {label: _first(scores) for label, scores in found.items()}
        said = next((s for s in first.values() if s is not None), None)
        if said is None:
            continue
        rest = [[s for s in scores if s is not first[label]] for label, scores in found.items()]
        also = ", ".join(f"{s['metric']} {_value(s)}" for s in rest[0] if s["value"] is not None)
        cells = [_cell(first[label]) for label in measured]
        rows.append([_name(task), said["num_fewshot"], said["metric"], *cells, *([also] if alone else [])])
    means = [averages(scores) for scores in measured.values()]
    cut = [{suite_of(s["task"]) for s in scores if s["partial"]} for scores in measured.values()]
    for each in zip(*means, strict=True):
        if any(a.num_measured for a in each) and (each[0].num_benchmarks > 1):
            cells = [
                _mean(a, a.name in names or (a.name == "average" and bool(names)))
                for a, names in zip(each, cut, strict=True)
            ]
            rows.append([f"mean: {each[0].name}", None, None, *cells, *([""] if alone else [])])
    return columns, [["" if cell is None else cell for cell in row] for row in rows]


def _tasks(measured: Mapping[str, Scores]) -> list[str]:
    """What gets a line: in the paper's order, then others; a group's single tasks are left to the ledger."""
    every = list(dict.fromkeys(s["task"] for scores in measured.values() for s in scores))
    ours = [b.harness for b in BENCHMARKS]
    groups = [t for t in every if t in ours]
    members = tuple(f"{t.removesuffix('_en')}_" for t in groups if t in ("mmlu", "bbh_fewshot", "agieval_en"))
    return [t for t in ours if t in every] + [t for t in every if t not in ours and not t.startswith(members)]


def _first(scores: Scores) -> Mapping[str, Any] | None:
    return next((s for s in scores if s["headline"]), scores[0] if scores else None)


def suite_of(task: str) -> str:
    """The column of the paper that a task or group of the harness counts in; its own name when it is none of them."""
    return next((b.suite for b in BENCHMARKS if b.harness == task), task)


def _name(task: str) -> str:
    return next((b.name for b in BENCHMARKS if b.harness == task), task)


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "n/a: not asked for"
    if score["value"] is None:
        return f"n/a: {score['note']}"
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.2f}"
    some = SOME_TASKS.match(score["note"] or "")
    part = [f"n={score['n']}, partial"] if score["partial"] else []
    part += [some.group(1)] if some else []
    return f"{100 * score['value']:.2f}{error} %" + (f" ({', '.join(part)})" if part else "")


def _value(score: Mapping[str, Any]) -> str:
    return f"{100 * score['value']:.2f} %" if score["higher_is_better"] else f"{score['value']:.4g}"


def _mean(average: Average, is_partial: bool) -> str:
    if average.value is None:
        return "n/a"
    share = f"{average.num_measured} of {average.num_benchmarks}"
    marks = [share] if average.num_measured < average.num_benchmarks else []
    marks += ["partial"] if is_partial else []
    return f"{100 * average.value:.2f} %" + (f" ({', '.join(marks)})" if marks else "")
