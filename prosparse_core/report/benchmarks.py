"""The benchmarks page: evaluations beside each other, each benchmark with its error, reason or share, as Markdown."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.report.conditions import conditions
from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import MINUS, SPACE, count, interval, is_number, pct
from prosparse_core.report.grid import Cell, Column, Grid, escaped
from prosparse_core.report.names import name_of, order_of

COLUMNS = ("code", "commonsense", "reading", "gsm8k", "mmlu", "bbh", "agieval")
"""Of the paper's Table 1; the last four are benchmarks of their own."""


def scores(runs: Sequence[ReportData]) -> Grid:
    """A line per benchmark, then the paper's means; a column per variant, and for two of them their difference.

    Raises:
        BadInput: the runs differ in batch size, precision or limit: their scores do not compare.
    """
    require_alike(runs)
    variants = sorted(
        {(r["setting"], r["variant"]) for data in runs for r in data["benchmarks"]}, key=lambda v: (order_of(v[0]), v)
    )
    columns = [Column("Benchmark", is_number=False), Column("Shots"), Column("Score", is_number=False)]
    columns += [Column(name_of(setting), variant) for setting, variant in variants]
    grid = Grid("Benchmarks", [*columns, *([Column("Difference", "points")] if len(variants) == 2 else [])])
    differences: dict[str, Record | None] = {}
    suites: dict[str, list[Record | None]] = {}
    for name in dict.fromkeys(r["benchmark"] for data in runs for r in data["benchmarks"]):
        found = _by_variant(runs, "benchmarks", "benchmark", name)
        first = next(iter(found.values()))
        metric = next((r["metric"] for r in found.values() if r["metric"]), "")
        documents = next((f"{count(r['n'])} documents" for r in found.values() if r["n"]), "")
        line = [Cell(name, documents), Cell(count(first["num_fewshot"])), Cell(metric)]
        values = [found.get(v) for _, v in variants]
        differences[name] = _paired(runs, name, values) if len(variants) == 2 else None
        suites.setdefault(next((r["suite"] for r in found.values() if r["suite"]), name), []).append(differences[name])
        grid.rows.append([*line, *_values(runs, grid, values, differences[name])])
    for suite in (s for s in COLUMNS if any(r["suite"] == s for data in runs for r in data["suites"])):
        found = _by_variant(runs, "suites", "suite", suite)
        row = next(iter(found.values()))
        share = "" if row["num_benchmarks"] == row["expected"] else f"{row['num_benchmarks']} of {row['expected']}"
        line = [Cell(f"mean: {suite}", share), Cell(""), Cell("")]
        grid.rows.append([*line, *_values(runs, grid, [found.get(v) for _, v in variants], _mean(suites[suite]))])
    board = {r["variant"]: r for data in runs for r in data["leaderboard"]}
    averages = [_average(board.get(v)) for _, v in variants]
    if any(len(data["benchmarks"]) > 1 for data in runs):
        line = [Cell("mean: the seven columns"), Cell(""), Cell("")]
        grid.rows.append([*line, *_values(runs, grid, averages, _mean([_mean(suites.get(c, [])) for c in COLUMNS]))])
    return grid


def require_alike(runs: Sequence[ReportData]) -> None:
    """Scores move with batch size, precision and limit, so rows that differ in them do not stand side by side."""
    found: dict[str, dict[Any, str]] = {"batch_size": {}, "dtype": {}, "limit": {}}
    for data in runs:
        run_id = str(data.run["run_id"])
        found["limit"][_limit(data)] = run_id
        for row in (r for r in data["benchmarks"] if is_number(r["value"])):
            found["batch_size"][row["batch_size"]] = found["dtype"][row["dtype"]] = run_id
    for key, by_value in found.items():
        if len(by_value) > 1:
            told = ", ".join(f"{value} in {run_id}" for value, run_id in by_value.items())
            raise BadInput(
                f"these evaluations do not compare: {key} is {told}",
                hint="measure one of them again with the other's --batch-size, --precision and --limit",
            )


def _by_variant(runs: Sequence[ReportData], subject: str, key: str, name: str) -> dict[Any, Record]:
    return {r["variant"]: r for data in runs for r in data[subject] if r[key] == name}


def _paired(runs: Sequence[ReportData], name: str, rows: Sequence[Record | None]) -> Record | None:
    """How the second variant differs from the first on the same documents; None where that was not kept."""
    first, second = rows
    if not (first and second and is_number(first["value"]) and is_number(second["value"])):
        return None
    here = {step["artifact"] for data in runs for step in data["steps"]}
    shown = second["value"] - first["value"]
    wanted = (second["variant"], first["variant"], name)
    for row in (r for data in runs for r in data["differences"]):
        is_same = (row["variant"], row["base"], row["benchmark"]) == wanted and row["base_artifact"] in here
        if is_same and math.isclose(row["value"], shown, abs_tol=1e-9):  # of the group, not of one of its tasks
            return row
    return None


def _mean(found: Sequence[Record | None]) -> Record | None:
    """The mean of differences that are independent of each other, with its 95 % interval; None unless all have one."""
    known = [d for d in found if d is not None and is_number(d["stderr"])]
    if not known or len(known) < len(found):
        return None
    value = math.fsum(d["value"] for d in known) / len(known)
    error = math.sqrt(math.fsum(d["stderr"] ** 2 for d in known)) / len(known)
    return {
        "value": value,
        "low": value - NORMAL * error,
        "high": value + NORMAL * error,
        "stderr": error,
        "note": None,
    }


NORMAL = 1.96
"""Standard errors from the middle of a 95 % interval to its ends."""


def _values(
    runs: Sequence[ReportData], grid: Grid, rows: Sequence[Record | None], paired: Record | None = None
) -> list[Cell]:
    cells = []
    for row in rows:
        if row is None:
            cells.append(grid.missing("not asked for"))
        elif not is_number(row["value"]):
            cells.append(grid.missing(without_folder(runs, "; ".join(row["reasons"] or [NO_REASON]))))
        else:
            lacks = row["not_measured"] if "benchmark" in row else None
            error = [f"± {100 * row['stderr']:.1f}"] if is_number(row["stderr"]) else []
            share = [f"without {', '.join(lacks)}"] if lacks else []
            cells.append(Cell(pct(row["value"], 1), "\n".join([*error, *share])))
    if len(rows) == 2:
        first, second = rows
        cells.append(_difference(grid, first, second, paired))
    return cells


NO_REASON = "the evaluation gives no reason"


def _difference(grid: Grid, first: Record | None, second: Record | None, paired: Record | None) -> Cell:
    """The difference with its interval on the same documents; without one, with the error of two that are independent,
    which is wide.
    """
    if not (first and second and is_number(first["value"]) and is_number(second["value"])):
        return grid.missing("one of the two is missing")
    points = f"{100 * (second['value'] - first['value']):+.1f}".replace("-", MINUS)
    if paired is not None:
        between = interval(paired["low"], paired["high"], _points)
        return Cell(points, f"({between})" if between else f"(interval n/a: {paired['note']})")
    error = ""
    if is_number(first["stderr"]) and is_number(second["stderr"]):
        error = f"± {100 * math.hypot(first['stderr'], second['stderr']):.1f}"
    return Cell(points, error)


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", MINUS)


def _average(board: Record | None) -> Record | None:
    if board is None:
        return None
    lacking = [*(c for c in COLUMNS if not is_number(board[c])), *(board["incomplete"] or [])]
    reasons = [f"the paper's average needs all of it: here {', '.join(dict.fromkeys(lacking))} are missing"]
    return {"value": board["average"], "stderr": board["average_stderr"], "reasons": reasons}


def without_folder(runs: Sequence[ReportData], text: str) -> str:
    """The folder of the data as DIR: where it lies on this machine tells a reader nothing."""
    for folder in sorted({_folder(data) for data in runs} - {""}, key=len, reverse=True):
        text = text.replace(folder, "DIR")
    return text


def _section(data: ReportData) -> Record:
    section = data.recipe.get("evaluate")
    return section if isinstance(section, dict) else {}


def _folder(data: ReportData) -> str:
    return str(_section(data).get("datasets") or "")


def _limit(data: ReportData) -> int | None:
    return _section(data).get("limit")


def page(runs: Sequence[ReportData]) -> str:
    """The Markdown of several evaluations.

    Raises:
        BadInput: they do not compare.
    """
    grid = scores(runs)
    how = (
        "Scores are marked as the paper counts them and carry one standard error; a difference has in brackets its "
        "95 % interval from a paired bootstrap by document, since both read the same. Where scores by document were "
        "not kept it has ± one standard error of two independent scores, which is wide. Means are unweighted, as in "
        "the paper. LAMBADA has one candidate: right is what greedy decoding gives, where the paper's rule, the lowest "
        "perplexity, would have to choose among several."
    )
    limit = _limit(runs[0])
    partial = f" Of each task the first {count(limit)} documents were read, so all but smaller tasks are partial."
    parts = [
        f"# Benchmarks: {escaped(', '.join(dict.fromkeys(d.model for d in runs)))}",
        "Generated from the ledger by `prosparse report --markdown`: change the runs, not this page. "
        + how
        + (partial if limit else ""),
        "## Scores",
        grid.markdown().partition("\n")[2].strip(),
        "## Conditions",
        conditions(runs).markdown().partition("\n")[2].strip(),
        "## How to reproduce this",
        "DIR is a folder laid out like the Hugging Face hub; without `--datasets` the hub itself is read."
        if any(_folder(d) for d in runs)
        else "The data come from the Hugging Face hub.",
        "```sh\n" + "\n".join([*(command(data) for data in runs), _report(runs)]) + "\n```",
    ]
    return "\n\n".join(parts).replace(SPACE, " ") + "\n"


def _report(runs: Sequence[ReportData]) -> str:
    return shlex.join(["prosparse", "report", *(str(d.run["run_id"]) for d in runs), "--markdown", "docs"])


def command(data: ReportData) -> str:
    """The ``prosparse evaluate`` that made a run, with the folder of its data as DIR."""
    section, model = _section(data), data.recipe.get("model") or {}
    words = ["prosparse", "evaluate", *sorted({r["variant"] for r in data["benchmarks"]})]
    words += ["--recipe", str(data.run["recipe"])] if data.run["recipe"] != "evaluate" else []
    tasks = section.get("benchmarks") or []
    words += ["--tasks", ",".join(map(str, tasks))] if tasks != ["paper"] else []
    for key in ("limit", "batch_size"):
        words += [f"--{key.replace('_', '-')}", str(section[key])] if section.get(key) else []
    words += ["--precision", str(model["precision"])] if model.get("precision") not in (None, "auto") else []
    words += ["--run-code"] if section.get("run_code") else []
    return shlex.join([*words, *(["--datasets", "DIR"] if section.get("datasets") else [])])
