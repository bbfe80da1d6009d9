"""The tables of speed: every comparison with a dense baseline, and the times themselves."""

from __future__ import annotations

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import count, is_number, number, pct, ratio
from prosparse_core.report.grid import NOT_APPLICABLE, Cell, Column, Grid
from prosparse_core.report.speed_rows import (
    KERNELS,
    baseline_name,
    condition,
    in_order,
    own_conditions,
    provider_name,
    why_refused,
)

MOST_ROWS = 120


def speedups(data: ReportData) -> Grid | None:
    """Every comparison with a dense baseline under the same conditions, and every kernel that was refused one."""
    columns = [
        Column("Kernel", is_number=False),
        Column("Implementation", is_number=False),
        Column("Baseline", is_number=False),
    ]
    columns += [
        Column("Zeros"),
        Column("Baseline", "median µs"),
        Column("Kernel", "median µs"),
        Column("Speed-up"),
        Column("Limit"),
    ]
    columns += [Column("Relative error", "before timing"), Column("Conditions", is_number=False)]
    grid = Grid("Speed-ups", columns)
    rows = in_order([*data["speedups"], *data["refused"]])
    for row in rows[:MOST_ROWS]:
        own = ", ".join(own_conditions(row, rows)) or "as above"
        cells = [_kernel(row), Cell(provider_name(row["provider"]))]
        zeros = Cell(pct(row["sparsity"])) if is_number(row["sparsity"]) else Cell(NOT_APPLICABLE, tone="quiet")
        error = Cell(number(row["rel_err"], 2)) if is_number(row["rel_err"]) else grid.missing("no error was recorded")
        if "speedup" in row:
            between = f"{ratio(row['speedup_low'])} \u2013 {ratio(row['speedup_high'])}"
            limit = row["limit_speedup"]
            cells += [
                Cell(baseline_name(row["baseline"])),
                zeros,
                Cell(number(row["baseline_us"])),
                Cell(number(row["p50_us"])),
            ]
            cells += [
                Cell(ratio(row["speedup"]), between),
                Cell(ratio(limit)) if limit else grid.missing("the bench gave no limit"),
            ]
            cells += [error, Cell(own)]
        else:
            blank = Cell(NOT_APPLICABLE, tone="quiet")
            cells += [
                blank,
                zeros,
                blank,
                blank,
                Cell("none", why_refused(row), tone="bad"),
                blank,
                error,
                Cell(own),
            ]
        grid.rows.append(cells)
    if len(rows) > MOST_ROWS:
        grid.notes.append(f"{len(rows) - MOST_ROWS} more rows are in the ledger")
    return grid if rows else None


def _kernel(row: Record) -> Cell:
    return Cell(*KERNELS.get(row["kernel"], (row["kernel"], "")))


def timings(data: ReportData) -> Grid | None:
    """The times themselves, baselines included."""
    columns = [Column("Kernel", is_number=False), Column("Implementation", is_number=False), Column("Zeros")]
    columns += [Column(t, "µs", group="Time of one call") for t in ("p20", "median", "p80")] + [
        Column("Repetitions"),
        Column("GB/s"),
    ]
    columns += [Column("Tokens/s"), Column("Check", is_number=False), Column("Conditions", is_number=False)]
    grid = Grid("Timings", columns)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    for row in in_order(data["timings"])[:MOST_ROWS]:
        state = {True: Cell("passed", tone="good"), False: Cell("failed", tone="bad")}.get(row["gate_passed"], blank)
        own = [
            condition(c, row[c])
            for c in ("dtype", "num_tokens", "threads", "mask_source", "cache", "timer")
            if row[c] is not None
        ]
        own += [f"layer {row['layer']}"] if row["layer"] is not None else []
        figures = [Cell(number(row[c])) if is_number(row[c]) else blank for c in ("p20_us", "p50_us", "p80_us")]
        figures.append(Cell(count(row["num_reps"])) if row["num_reps"] else blank)
        figures += [Cell(number(row[c], 3)) if is_number(row[c]) else blank for c in ("gbps", "tokens_per_s")]
        zeros = Cell(pct(row["sparsity"])) if is_number(row["sparsity"]) else blank
        grid.rows.append(
            [_kernel(row), Cell(provider_name(row["provider"])), zeros, *figures, state, Cell(", ".join(own))]
        )
    if len(data["timings"]) > MOST_ROWS:
        grid.notes.append(f"{len(data['timings']) - MOST_ROWS} more timings are in the ledger")
    return grid if grid.rows else None
