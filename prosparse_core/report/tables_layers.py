"""The table of the activations: how many are zero, how large the others are, how many neurons died."""

from __future__ import annotations

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, number, pct, ratio
from prosparse_core.report.grid import Cell, Column, Grid
from prosparse_core.report.names import name_of

COLUMNS = (
    ("sparsity", "Sparsity", "zeros in x1"),
    ("chunk_sparsity", "Chunk sparsity", "zero in all of 8 tokens in a row"),
    ("dead_frac", "Dead neurons", "zero in every token of a corpus"),
    ("mean_abs_live", "Survivors", "mean |x1| of the non-zeros"),
    ("survivor_ratio", "Survivors / original", "over the dense model's mean |x1|"),
)
"""Column of the ledger, its name, and what it is."""
OLDER = "not in this evaluation: it is older than this number"
NO_DENSE = "the original was not measured in this run on the same corpora"
NO_CHUNK = "no sequence was as long as a chunk, or the evaluation is older than this number"


def activations(data: ReportData) -> Grid | None:
    """One line a setting: means over layers, then over corpora."""
    rows = data["layers"]
    if not rows:
        return None
    columns = [Column("Setting", is_number=False), *(Column(name, about) for _, name, about in COLUMNS)]
    grid = Grid("What is left of the activations", columns)
    measured = [(s, v) for s, v in data.settings if any(r["variant"] == v for r in rows)]
    for setting, variant in measured:
        own = [r for r in rows if r["variant"] == variant]
        line = [Cell(name_of(setting), data.details(setting, variant))]
        for column, _, _ in COLUMNS:
            value = mean_over(own, column)
            line.append(_cell(column, value) if value is not None else grid.missing(_why(column, own)))
        grid.rows.append(line)
    return grid


def mean_over(rows: list[Record], column: str) -> float | None:
    """The mean over layers of each corpus, then over corpora; None without a number."""
    corpora: dict[str, list[float]] = {}
    for row in rows:
        if is_number(row[column]):
            corpora.setdefault(row["corpus"], []).append(row[column])
    means = [sum(values) / len(values) for values in corpora.values()]
    return sum(means) / len(means) if means else None


def _cell(column: str, value: float) -> Cell:
    if column == "survivor_ratio":
        return Cell(ratio(value))
    return Cell(number(value, 3) if column == "mean_abs_live" else pct(value))


def _why(column: str, rows: list[Record]) -> str:
    if column == "chunk_sparsity":
        return NO_CHUNK
    is_measured = any(is_number(r["mean_abs_live"]) for r in rows)
    return NO_DENSE if column == "survivor_ratio" and is_measured else OLDER
