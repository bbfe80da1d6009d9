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
            limit = row["byte_ratio"]
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
    columns += [Column("Of the ceiling"), Column("Tokens/s"), Column("Check", is_number=False)]
    columns += [Column("Conditions", is_number=False)]
    grid = Grid("Timings", columns)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    for row in in_order(data["timings"])[:MOST_ROWS]:
        state = {True: Cell("passed", tone="good"), False: Cell("failed", tone="bad")}.get(row["gate_passed"], blank)
        own = [
            condition(c, row[c])
            for c in ("dtype", "num_tokens", "threads", "mask_source", "cutoff", "cache", "timer")
            if row[c] is not None
        ]
        own += [f"layer {row['layer']}"] if row["layer"] is not None else []
        figures = [Cell(number(row[c])) if is_number(row[c]) else blank for c in ("p20_us", "p50_us", "p80_us")]
        figures.append(Cell(count(row["num_reps"])) if row["num_reps"] else blank)
        figures.append(Cell(number(row["gbps"], 3)) if is_number(row["gbps"]) else blank)
        figures.append(Cell(pct(row["bandwidth_share"], 0)) if is_number(row["bandwidth_share"]) else blank)
        figures.append(Cell(number(row["tokens_per_s"], 3)) if is_number(row["tokens_per_s"]) else blank)
        zeros = Cell(pct(row["sparsity"])) if is_number(row["sparsity"]) else blank
        grid.rows.append(
            [_kernel(row), Cell(provider_name(row["provider"])), zeros, *figures, state, Cell(", ".join(own))]
        )
    if len(data["timings"]) > MOST_ROWS:
        grid.notes.append(f"{len(data['timings']) - MOST_ROWS} more timings are in the ledger")
    return grid if grid.rows else None


MASKS = {"recorded": "the model's own", "raised": "raised, for timing"}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def decoding(data: ReportData) -> Grid | None:
    """Every way to decode: its time beside what it computes, and a predictor's beside what its errors cost."""
    columns = [Column("Loop", is_number=False), Column("Weights", is_number=False), Column("Masks", is_number=False)]
    columns += [Column("Zeros"), Column("Computed", "neurons"), Column("One token", "ms"), Column("Tokens/s")]
    columns += [Column("GB/s", "of the ceiling"), Column("Own dense loop", "limit", group="As fast as")]
    columns += [Column("transformers", group="As fast as"), Column("Perplexity", "rise")]
    grid = Grid("Decoding, one sequence", columns)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    for row in data["decode"]:
        cutoff = f"cutoff {row['cutoff']:g}" if is_number(row["cutoff"]) else ""
        own = "our loop, dense" if row["provider"] == "native_dense" else provider_name(row["provider"])
        cells = [Cell(own, cutoff), Cell(TYPES.get(row["dtype"], str(row["dtype"])))]
        cells.append(Cell(MASKS.get(row["mask_source"], "none: the dense original")))
        cells += [Cell(pct(row[c])) if is_number(row[c]) else blank for c in ("sparsity", "live_frac")]
        if not is_number(row["p50_us"]):
            cells += [grid.missing(row["note"] or "not timed"), *(blank,) * 5]
            grid.rows.append(cells)
            continue
        low, high = row["p20_us"] / 1e3, row["p80_us"] / 1e3
        cells.append(Cell(number(row["p50_us"] / 1e3, 3), f"{number(low, 3)} \u2013 {number(high, 3)}"))
        cells.append(Cell(number(row["tokens_per_s"], 3)))
        share = pct(row["bandwidth_share"], 0) if is_number(row["bandwidth_share"]) else ""
        cells.append(Cell(number(row["gbps"], 3), share) if is_number(row["gbps"]) else blank)
        limit = f"limit {ratio(row['byte_ratio'])}" if is_number(row["byte_ratio"]) else ""
        is_own = row["provider"] == "native_dense"
        cells.append(Cell(ratio(row["over_own_dense"]), limit) if row["over_own_dense"] and not is_own else blank)
        is_theirs = row["provider"] == "transformers_dense"
        cells.append(Cell(ratio(row["over_transformers"])) if row["over_transformers"] and not is_theirs else blank)
        rise = row["perplexity_increase_pct"]
        cells.append(
            Cell(number(row["perplexity"]), f"{rise:+.1f}\u202f%" if is_number(rise) else "")
            if is_number(row["perplexity"])
            else blank
        )
        grid.rows.append(cells)
    return grid if grid.rows else None
