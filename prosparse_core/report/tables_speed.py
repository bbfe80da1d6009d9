"""The tables of speed: every comparison with a dense baseline, and the times themselves."""

from __future__ import annotations

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import count, is_number, number, pct, ratio
from prosparse_core.report.grid import NOT_APPLICABLE, Cell, Column, Grid
from prosparse_core.report.speed_rows import (
    ABOVE,
    KERNELS,
    baseline_name,
    condition,
    in_order,
    marked,
    own_conditions,
    provider_name,
    why_refused,
)

MOST_ROWS = 120


def speedups(data: ReportData) -> Grid | None:
    """Every kernel over the best dense one of the same session under the same conditions, and every refused one."""
    rows = in_order([*(r for r in data["speedups"] if r["is_best"]), *data["refused"]])
    return _comparisons("Speed-ups over the best dense kernel of the run", rows, has_bytes=True)


def other_speedups(data: ReportData) -> Grid | None:
    """The same over the dense baselines that are not the best, such as torch where it is slower than our own kernel."""
    rows = in_order([r for r in data["speedups"] if not r["is_best"]])
    return _comparisons("Appendix: over slower dense kernels", rows, has_bytes=False)


def _comparisons(title: str, rows: list[Record], *, has_bytes: bool) -> Grid | None:
    columns = [
        Column("Kernel", is_number=False),
        Column("Implementation", is_number=False),
        Column("Baseline", is_number=False),
        Column("Zeros"),
        Column("Baseline", "µs", group="Median time"),
        Column("Kernel", "µs", group="Median time"),
        Column("Speed-up"),
        *([Column("Byte ratio")] if has_bytes else []),
        Column("Relative error", "before timing"),
        Column("Conditions", is_number=False),
    ]
    grid = Grid(title, columns)
    for row in rows[:MOST_ROWS]:
        own = ", ".join(own_conditions(row, rows)) or "as above"
        cells = [_kernel(row), Cell(provider_name(row["provider"]))]
        zeros = Cell(pct(row["sparsity"])) if is_number(row["sparsity"]) else Cell(NOT_APPLICABLE, tone="quiet")
        error = Cell(number(row["rel_err"], 2)) if is_number(row["rel_err"]) else grid.missing("no error was recorded")
        if "speedup" in row:
            cells += [
                Cell(baseline_name(row["baseline"])),
                zeros,
                Cell(number(row["baseline_us"])),
                Cell(number(row["p50_us"])),
                _speedup(grid, row, f"{ratio(row['speedup_low'])} \u2013 {ratio(row['speedup_high'])}"),
                *([_byte_ratio(grid, row)] if has_bytes else []),
            ]
        else:
            blank = Cell(NOT_APPLICABLE, tone="quiet")
            refused = Cell("none", why_refused(row), tone="bad")
            cells += [blank, zeros, blank, blank, refused, *([blank] if has_bytes else [])]
        grid.rows.append([*cells, error, Cell(own)])
    if len(rows) > MOST_ROWS:
        grid.notes.append(f"{len(rows) - MOST_ROWS} more rows are in the ledger")
    return grid if rows else None


def _speedup(grid: Grid, row: Record, small: str) -> Cell:
    """Marked, with a note that explains it, where it is above the byte ratio."""
    note = grid.missing(row["above_byte_ratio_note"]).note if row["above_byte_ratio"] else None
    return Cell(marked(row), small, note=note)


def _byte_ratio(grid: Grid, row: Record) -> Cell:
    if is_number(row["byte_ratio"]):
        return Cell(ratio(row["byte_ratio"]))
    return grid.missing(row["byte_ratio_note"] or "the bench gave no byte ratio")


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
            for c in ("dtype", "num_tokens", "prompt_tokens", "threads", "mask_source", "cutoff", "cache", "timer")
            if row[c] is not None
        ]
        own += [f"layer {row['layer']}"] if row["layer"] is not None else []
        figures = [Cell(number(row[c])) if is_number(row[c]) else blank for c in ("p20_us", "p50_us", "p80_us")]
        figures.append(Cell(count(row["num_reps"])) if row["num_reps"] else blank)
        figures.append(Cell(number(row["gbps"], 3)) if is_number(row["gbps"]) else blank)
        figures.append(_of_ceiling(grid, row) if is_number(row["bandwidth_share"]) else blank)
        figures.append(Cell(number(row["tokens_per_s"], 3)) if is_number(row["tokens_per_s"]) else blank)
        zeros = Cell(pct(row["sparsity"])) if is_number(row["sparsity"]) else blank
        grid.rows.append(
            [_kernel(row), Cell(provider_name(row["provider"])), zeros, *figures, state, Cell(", ".join(own))]
        )
    if len(data["timings"]) > MOST_ROWS:
        grid.notes.append(f"{len(data['timings']) - MOST_ROWS} more timings are in the ledger")
    return grid if grid.rows else None


def _of_ceiling(grid: Grid, row: Record) -> Cell:
    share = pct(row["bandwidth_share"], 0)
    if row["bandwidth_share"] <= 1:
        return Cell(share)
    return Cell(share + ABOVE, note=grid.missing("above the ceiling: memory was never seen to be read as fast").note)


MASKS = {"recorded": "the model's own", "raised": "raised, for timing"}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def decoding(data: ReportData) -> Grid | None:
    """Every way to decode: its time beside what it computes, and a predictor's beside what its errors cost."""
    columns = [Column("Prompt", "tokens"), Column("Loop", is_number=False), Column("Weights", is_number=False)]
    columns += [Column("Masks", is_number=False)]
    columns += [Column("Zeros"), Column("Computed", "neurons"), Column("One token", "ms"), Column("Tokens/s")]
    columns += [Column("GB/s", "of the ceiling"), Column("Best dense loop", "which", group="As fast as")]
    columns += [Column("Byte ratio"), Column("Perplexity", "rise")]
    grid = Grid("Decoding, one sequence", columns)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    for row in data["decode"]:
        cutoff = f"cutoff {row['cutoff']:g}" if is_number(row["cutoff"]) else ""
        own = "our loop, dense" if row["provider"] == "native_dense" else provider_name(row["provider"])
        cells = [Cell(count(row["prompt_tokens"])) if row["prompt_tokens"] else blank]
        cells += [Cell(own, cutoff), Cell(TYPES.get(row["dtype"], str(row["dtype"])))]
        cells.append(Cell(MASKS.get(row["mask_source"], "none: the dense original")))
        cells += [Cell(pct(row[c])) if is_number(row[c]) else blank for c in ("sparsity", "live_frac")]
        if not is_number(row["p50_us"]):
            cells += [grid.missing(row["note"] or "not timed"), *(blank,) * (len(columns) - len(cells) - 1)]
            grid.rows.append(cells)
            continue
        low, high = row["p20_us"] / 1e3, row["p80_us"] / 1e3
        cells.append(Cell(number(row["p50_us"] / 1e3, 3), f"{number(low, 3)} \u2013 {number(high, 3)}"))
        cells.append(Cell(number(row["tokens_per_s"], 3)))
        share = pct(row["bandwidth_share"], 0) if is_number(row["bandwidth_share"]) else ""
        cells.append(Cell(number(row["gbps"], 3), share) if is_number(row["gbps"]) else blank)
        if is_number(row["speedup"]):
            cells += [_speedup(grid, row, f"over {baseline_name(row['baseline'])}"), _byte_ratio(grid, row)]
        else:
            cells += [blank, blank]
        rise = row["perplexity_increase_pct"]
        cells.append(
            Cell(number(row["perplexity"]), f"{rise:+.1f}\u202f%" if is_number(rise) else "")
            if is_number(row["perplexity"])
            else blank
        )
        grid.rows.append(cells)
    return grid if grid.rows else None
