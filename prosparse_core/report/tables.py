"""The tables of the results: settings, benchmarks, and the cliff that training starts from."""

from __future__ import annotations

from typing import Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import count, interval, is_number, number, pct, plain, ratio, spread
from prosparse_core.report.grid import NOT_APPLICABLE, Cell, Column, Grid
from prosparse_core.report.names import name_of

ALL = "all"


def results(data: ReportData) -> Grid:
    """Perplexity and sparsity per corpus, accuracy, threshold and tokens of every setting; ratios to the original."""
    corpora = [*data.corpora, *([ALL] if len(data.corpora) > 1 else [])]
    board = {r["variant"]: r for r in data["leaderboard"]}
    columns = [Column("Setting", is_number=False)]
    groups = (f"Token perplexity{f' ({data.text})' if data.text else ''}", "Sparsity")
    for group in groups:
        columns += [Column(c, _all(data, c), group=group) for c in corpora] or [Column("", group=group)]
    columns += [Column("Accuracy", _accuracy_of(data)), Column("Threshold"), Column("Tokens seen")]
    grid = Grid("Results", columns)
    settings = data.settings
    base = next((v for s, v in settings if s == "original"), None)
    for setting, variant in settings:
        why = data.why_missing("evaluate", setting)
        row = [Cell(name_of(setting), data.details(setting, variant))]
        row += [_perplexity(grid, data, board, variant, base, c, why) for c in corpora] or [grid.missing(why)]
        row += [_sparsity(grid, data, board, variant, c, why) for c in corpora] or [grid.missing(why)]
        row += [_accuracy(grid, data, board.get(variant), why), _threshold(grid, data, setting, board.get(variant))]
        tokens = board[variant]["tokens_seen"] if variant in board else None
        row.append(Cell(count(tokens)) if is_number(tokens) else grid.missing(why))
        grid.rows.append(row)
    return grid


def _all(data: ReportData, corpus: str) -> str:
    return data.weighing if corpus == ALL else ""


def score_of(data: ReportData, variant: str | None, corpus: str) -> Record | None:
    """The token perplexity of one variant on one corpus."""
    rows = [
        r
        for r in data["scores"]
        if r["variant"] == variant and r["corpus"] == corpus and r["metric"] == "token_perplexity"
    ]
    return min(rows, key=lambda r: r["task"] is not None, default=None)


def _perplexity(
    grid: Grid, data: ReportData, board: dict[Any, Record], variant: str | None, base: str | None, corpus: str, why: str
) -> Cell:
    if corpus == ALL:
        value, dense = (board.get(v, {}).get("perplexity") for v in (variant, base))
        text, error = spread(value, board.get(variant, {}).get("perplexity_stderr"))
    else:
        found, original = score_of(data, variant, corpus), score_of(data, base, corpus)
        value, dense = (r["value"] if r else None for r in (found, original))
        text, error = spread(value, found["stderr"] if found else None)
        why = found["note"] if found and found["note"] and not is_number(value) else why
    if not is_number(value):
        return grid.missing(why)
    parts = [error]
    if is_number(dense) and dense > 0 and variant != base:
        parts += times_original(data, variant, base, corpus, value / dense)
    return Cell(text, "\n".join(p for p in parts if p))


def times_original(data: ReportData, variant: Any, base: Any, corpus: str, times: float) -> list[str]:
    """A perplexity as a multiple of the original's, and its 95 % interval on the same documents."""
    found = data.against(variant, base, corpus=corpus, metric="token_perplexity")
    if found is None:
        return [ratio(times)]
    between = interval(found["low"], found["high"])
    return [ratio(times), f"({between})" if between else f"(interval n/a: {found['note']})"]


def _sparsity(
    grid: Grid, data: ReportData, board: dict[Any, Record], variant: str | None, corpus: str, why: str
) -> Cell:
    row = board.get(variant, {})
    value = row.get("sparsity") if corpus == ALL else (row.get("sparsity_by_corpus") or {}).get(corpus)
    return Cell(pct(value)) if is_number(value) else grid.missing(why)


def _accuracy_of(data: ReportData) -> str:
    tasks = {r["task"] for r in data["scores"] if r["task"] and r["headline"]}
    return str(tasks.pop()) if len(tasks) == 1 else f"mean of {len(tasks)} tasks" if tasks else ""


def headline_score(data: ReportData, variant: Any) -> Record | None:
    """The one headline score of a variant; None where there are several or none."""
    rows = [r for r in data["scores"] if r["variant"] == variant and r["task"] and r["headline"]]
    return rows[0] if len(rows) == 1 else None


def _accuracy(grid: Grid, data: ReportData, row: Record | None, why: str) -> Cell:
    if row is None:
        return grid.missing(why)
    if not is_number(row["accuracy"]):
        return grid.missing("; ".join(row["not_measured"] or []) or "no benchmark was measured of this setting")
    parts, score = [], headline_score(data, row["variant"])
    if score and is_number(score["stderr"]):
        parts.append(f"± {100 * score['stderr']:.1f}")
    if row["num_benchmarks"] > 1:
        parts.append(f"{row['num_benchmarks']} benchmarks")
    if row["partial"]:
        parts.append("partial")
    return Cell(pct(row["accuracy"]), "\n".join(parts))


def _threshold(grid: Grid, data: ReportData, setting: str, row: Record | None) -> Cell:
    if setting != "prosparse" and not (row and row["threshold"]):
        return Cell(NOT_APPLICABLE, tone="quiet")
    if row and is_number(row["threshold"]):
        per_layer = {r["threshold"] for r in data["layers"] if r["variant"] == row["variant"]}
        return Cell(plain(row["threshold"]), "mean over layers" if len(per_layer) > 1 else "")
    chosen = next((r["threshold"] for r in data["tradeoff"] if r["chosen"]), None)
    return Cell(plain(chosen)) if is_number(chosen) else grid.missing(data.why_missing("calibrate"))


def cliff(data: ReportData) -> Grid | None:
    """What putting ReLU in does before any training; on calibration text, so not comparable with the results."""
    rows = data["cliff"]
    corpora = [c for c in data.corpora if any(r["corpus"] == c for r in rows)] or sorted({r["corpus"] for r in rows})
    if not rows:
        return None
    grid = Grid(
        "The cliff",
        [Column("Model", is_number=False), *(Column(c, group="Token perplexity, calibration text") for c in corpora)],
    )
    value = {(r["setting"], r["corpus"]): r["perplexity"] for r in rows}
    for setting in sorted({r["setting"] for r in rows}, key=lambda s: s != "original"):
        name = (
            "Original" if setting == "original" else "ReLU put in, untrained" if setting == "substituted" else setting
        )
        cells = [Cell(name)]
        for corpus in corpora:
            now, before = value.get((setting, corpus)), value.get(("original", corpus))
            times = (
                ratio(now / before)
                if is_number(now) and is_number(before) and before > 0 and setting != "original"
                else ""
            )
            cells.append(
                Cell(number(now), times) if is_number(now) else grid.missing("the step measured no such number")
            )
        grid.rows.append(cells)
    return grid


def exported(data: ReportData) -> Grid | None:
    """What the export scored when it was loaded again, as the step noted it."""
    columns = [Column("Text", is_number=False), Column("Metric", is_number=False), Column("Value"), Column("n")]
    grid = Grid("The export, loaded again", [*columns, Column("Remark", is_number=False)])
    for row in data["exported"]:
        limit = f"first {row['limit']} documents" if row["limit"] else ""
        value = (
            Cell(*spread(row["value"], row["stderr"])) if is_number(row["value"]) else grid.missing("see the remark")
        )
        name = str(row["task"]).removeprefix("exported/")
        grid.rows.append(
            [Cell(name, limit), Cell(row["metric"]), value, Cell(count(row["n"])), Cell(row["note"] or "")]
        )
    return grid if grid.rows else None


def _measured_column(
    data: ReportData, setting: str, variant: str | None, settings: list[tuple[str, str | None]]
) -> Column:
    """Named by the setting, and by what tells it from others of the setting where there are any."""
    is_alone = sum(s == setting for s, _ in settings) == 1
    return Column(name_of(setting) if is_alone else f"{name_of(setting)}, {data.details(setting, variant)}")


def benchmarks(data: ReportData) -> Grid | None:
    """Every benchmark score by setting, with its standard error and its conditions."""
    rows = [r for r in data["scores"] if r["task"] and not r["corpus"]]
    settings = [(s, v) for s, v in data.settings if any(r["variant"] == v for r in rows)]
    if not rows:
        return None
    columns = [Column("Task", is_number=False), Column("Metric", is_number=False)]
    grid = Grid("Benchmarks", columns + [_measured_column(data, s, v, settings) for s, v in settings])
    for task, metric in sorted({(r["task"], r["metric"]) for r in rows}):
        found = {r["variant"]: r for r in rows if (r["task"], r["metric"]) == (task, metric)}
        first = next(iter(found.values()))
        shots = f"{first['num_fewshot']}-shot" if is_number(first["num_fewshot"]) else ""
        limit = f"first {first['limit']}" if first["limit"] else ""
        documents = f"{count(first['n'])} documents" if first["n"] else ""
        line = [
            Cell(task, " · ".join(p for p in (documents, shots, limit) if p)),
            Cell(metric, "headline" if first["headline"] else ""),
        ]
        for _, variant in settings:
            row = found.get(variant)
            if row is None or not is_number(row["value"]):
                line.append(grid.missing((row and row["note"]) or "not measured of this setting"))
            else:
                error = f"± {100 * row['stderr']:.1f}" if is_number(row["stderr"]) else ""
                is_fraction = 0 <= row["value"] <= 1
                line.append(
                    Cell(pct(row["value"]), error) if is_fraction else Cell(*spread(row["value"], row["stderr"]))
                )
        grid.rows.append(line)
    return grid
