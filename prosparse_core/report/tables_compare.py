"""The tables of a comparison: every setting over its seeds, the threshold rules, and the paper."""

from __future__ import annotations

from typing import Any

from prosparse_core.report.courses import course_order
from prosparse_core.report.data import MIXED, Record, ReportData
from prosparse_core.report.format import MINUS, SPACE, count, is_number, number, pct, plain, ratio, spread
from prosparse_core.report.grid import NOT_APPLICABLE, Cell, Column, Grid
from prosparse_core.report.names import name_of, seeds
from prosparse_core.report.plot_tradeoff import best_within, budget_of
from prosparse_core.report.tables_claim import signed


def comparison(data: ReportData) -> Grid:
    """One line per setting and factor: means over seeds, their spread, and the evaluation's own standard error."""
    columns = [Column("Setting", is_number=False), Column("λ", "at its end"), Column("Seeds"), Column("Tokens")]
    columns += [Column("Mean", "± sd over seeds", group="Perplexity"), Column("Standard error", group="Perplexity")]
    columns += [Column("Ratio to the original", group="Perplexity"), Column("Sparsity", "± sd over seeds")]
    columns += [Column("Accuracy", "± standard error"), Column("Threshold")]
    columns += [Column("Sum over steps", group="λ"), Column("Steps at the last", group="λ")]
    columns += [Column("Of the peak", group="Learning rate left at the last λ")]
    columns += [Column("Of its sum", "regularized steps", group="Learning rate left at the last λ")]
    grid = Grid("Settings, and the tokens they saw", columns)
    rows = sorted(data["comparison"], key=lambda r: (*course_order(r, None), r["variants"]))
    dense = next((r["perplexity"] for r in rows if r["setting"] == "original"), None)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    for row in rows:
        why = _why_absent(data, row["setting"])
        factor = Cell(plain(row["l1"])) if is_number(row["l1"]) else _no_factor(row, blank)
        line = [Cell(name_of(row["setting"]), _number_of_runs(row)), factor]
        line += [Cell(seeds(row["seeds"]) or NOT_APPLICABLE), Cell(count(row["tokens_seen"]))]
        line.append(_mean(row["perplexity"], row["perplexity_sd"]) or grid.missing(why))
        error = row["perplexity_stderr"]
        line.append(Cell(f"± {number(error, 2)}") if is_number(error) else grid.missing(_NO_ERROR))
        is_placed = is_number(dense) and is_number(row["perplexity"]) and dense > 0
        line.append(Cell(ratio(row["perplexity"] / dense)) if is_placed else grid.missing(_NO_ORIGINAL))
        line.append(_share(row["sparsity"], row["sparsity_sd"]) or grid.missing(why))
        line.append(_share(row["accuracy"], row["accuracy_stderr"]) or grid.missing(why))
        line.append(Cell(plain(row["threshold"])) if row["threshold"] else blank)
        line += _course(grid, row, blank)
        grid.rows.append(line)
    there = {r["setting"] for r in rows}
    for setting in (s for s in data.expected if s not in there):
        absent = grid.missing(data.why_missing("evaluate", setting))
        grid.rows.append([Cell(name_of(setting)), *[absent] * (len(columns) - 1)])
    return grid


def _course(grid: Grid, row: Record, blank: Cell) -> list[Cell]:
    """How lambda went: what tells the arms apart besides their perplexity."""
    if not row["l1"] and not is_number(row["l1_sum"]):
        return [blank] * 4
    if not is_number(row["l1_sum"]):
        return [grid.missing("the training log does not tell of every step")] * 4
    cells = [Cell(f"{row['l1_sum']:.3g}"), Cell(count(round(row["steps_at_last_l1"])))]
    return [*cells, Cell(pct(row["lr_at_last_l1"], 1)), Cell(pct(row["lr_left"], 1))]


_NO_ERROR = "the evaluation recorded no standard error of every corpus"
_NO_ORIGINAL = "the original's perplexity or this one was not measured"


def _number_of_runs(row: Record) -> str:
    return f"{row['num_seeds']} training runs" if row["num_seeds"] > 1 else ""


def _no_factor(row: Record, blank: Cell) -> Cell:
    return Cell("differs by seed", tone="quiet") if row["num_seeds"] > 1 and row["setting"] == "closed_loop" else blank


def _why_absent(data: ReportData, setting: str) -> str:
    notes = [n for r in data["leaderboard"] if r["setting"] == setting for n in r["not_measured"] or []]
    return "; ".join(dict.fromkeys(notes)) or data.why_missing("evaluate", setting)


def _mean(value: Any, sd: Any) -> Cell | None:
    return Cell(*spread(value, sd)) if is_number(value) else None


def _share(value: Any, error: Any) -> Cell | None:
    if not is_number(value):
        return None
    return Cell(pct(value, 2), f"± {100 * error:.2f}" if is_number(error) else "")


def rules(data: ReportData) -> Grid | None:
    """What each threshold rule came to within the budget, on all calibration text together, and the one that was taken
    on held-out text."""
    rows = [r for r in data["tradeoff"] if r["corpus"] == MIXED]
    columns = [Column("Thresholds", is_number=False), Column("t"), Column("Sparsity", group=_TRIED)]
    columns += [Column("Perplexity", group=_TRIED), Column("Rise", group=_TRIED)]
    columns += [Column("Ended by", is_number=False, group=_TRIED), Column("Taken", is_number=False)]
    grid = Grid("Threshold rules", [*columns, Column("Rise", group=_HELD_OUT), Column("Sparsity", group=_HELD_OUT)])
    for rule, scope in sorted({(r["rule"], r["scope"]) for r in rows}, key=lambda rs: (rs[1] != "global", rs[0])):
        curve = [r for r in rows if (r["rule"], r["scope"]) == (rule, scope)]
        taken = next((r for r in curve if r["chosen"]), None)
        row = taken or best_within(curve, budget_of(data))
        name = Cell("one for all layers" if scope == "global" else "one per layer", rule)
        if row is None:
            grid.rows.append([name, *[grid.missing("no threshold of this rule stays within the budget")] * 8])
            continue
        t = Cell(plain(row["threshold"]), "" if scope == "global" else "mean over layers")
        rise = row["perplexity_increase_pct"]
        line = [name, t, Cell(pct(row["sparsity"], 2)), Cell(number(row["perplexity"]))]
        line += [Cell(signed(rise)) if is_number(rise) else grid.missing("no threshold 0 was tried")]
        ending = _ENDED.get(row["stopped_by"])
        line += [Cell(ending) if ending else grid.missing("what ended the search was not recorded")]
        line += [Cell("yes" if taken else "no"), *_on_held_out(data, grid, taken)]
        grid.rows.append(line)
    return grid if grid.rows else None


_ENDED = {"budget": "the budget", "saturated": "sparsity, which larger thresholds do not raise"}
_TRIED, _HELD_OUT = "Calibration text", "Held-out text"


def _on_held_out(data: ReportData, grid: Grid, taken: Record | None) -> list[Cell]:
    if taken is None:
        return [grid.missing("only the thresholds that were taken are evaluated on held-out text")] * 2
    rows = [r for r in data["held_out"] if r["corpus"] == MIXED and r["variant_before"] == taken["variant"]]
    row = next((r for r in rows if (r["rule"], r["scope"]) == (taken["rule"], taken["scope"])), None)
    if row is None or not is_number(row["perplexity_increase_pct"]):
        return [grid.missing(data.why_missing("evaluate", "prosparse"))] * 2
    return [Cell(signed(row["perplexity_increase_pct"])), Cell(pct(row["sparsity"], 2))]


def paper(data: ReportData) -> Grid | None:
    """Our numbers beside the published ones, with the table each is printed in; further seeds are left out."""
    main = {data.main_row(s)["variant"] for s in {r["setting"] for r in data["leaderboard"]}}
    kept = [r for r in data["paper"] if r["variant"] in main or r["setting"] == "fixed_l1"]
    own_seed = {r["seed"] for r in kept if r["variant"] in main}
    kept = [r for r in kept if r["setting"] != "fixed_l1" or r["seed"] in own_seed]
    if not kept:
        return None
    columns = [Column("Setting", is_number=False), Column("Measure", is_number=False), Column("Ours")]
    grid = Grid("Beside the paper", [*columns, Column("Published"), Column("Gap"), Column("Source", is_number=False)])
    for row in sorted(kept, key=lambda r: (*course_order(r, None), r["metric"])):
        factor = f"λ {plain(row['l1'])}" if row["setting"] == "fixed_l1" and is_number(row["l1"]) else ""
        unit = "×" if row["metric"].endswith("_speedup") else f"{SPACE}%"
        name = row["metric"].removesuffix("_pct").replace("_", " ")
        gap = Cell(f"{row['gap']:+.2f}".replace("-", MINUS)) if is_number(row["gap"]) else grid.missing(row["reason"])
        ours = Cell(f"{row['ours']:.2f}{unit}", _marks(row))
        line = [Cell(name_of(row["setting"]), factor), Cell(name), ours]
        grid.rows.append([*line, Cell(f"{row['paper']:.2f}{unit}"), gap, Cell(row["source"])])
    return grid


def _marks(row: Record) -> str:
    marks = [f"± {row['stderr']:.1f}"] if is_number(row["stderr"]) else []
    return "\n".join([*marks, *(["partial"] if row["partial"] else [])])


def printed(data: ReportData) -> Grid:
    """The paper's ablation of the fixed factor, beside its progressive rows."""
    columns = [Column("Model", is_number=False), Column("Setting", is_number=False), Column("Sparsity")]
    grid = Grid("The paper's ablation", [*columns, Column("Average accuracy"), Column("Source", is_number=False)])
    for row in data["printed"]:
        line = [Cell(row["model"]), Cell(name_of(row["setting"]), row["condition"])]
        line += [Cell(f"{row['sparsity_pct']:.2f}{SPACE}%"), Cell(f"{row['average_pct']:.2f}{SPACE}%")]
        grid.rows.append([*line, Cell(row["source"])])
    return grid
