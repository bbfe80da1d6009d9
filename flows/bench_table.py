"""The tables ``prosparse bench`` closes with: every timing of a run beside every condition it was taken under."""

from __future__ import annotations

from typing import Any

from prosparse_core.ledger import Ledger

SQL = """
SELECT s.kernel, s.provider, s.dtype, s.num_tokens AS tokens, s.mask_source AS masks, round(s.sparsity, 4) AS zeros,
       round(s.live_frac, 4) AS live, s.cutoff, s.p20_us, s.p50_us, s.p80_us, s.num_reps AS reps,
       round(s.gbps, 2) AS gbps, round(s.bandwidth_share, 3) AS of_ceiling,
       round((SELECT max(u.speedup) FROM speedup u WHERE u.baseline IN ('torch', 'transformers_dense') AND {same}), 3)
         AS over_torch,
       round((SELECT max(u.speedup) FROM speedup u WHERE u.baseline = 'native_dense' AND {same}), 3) AS over_own_dense,
       round(s.byte_ratio, 3) AS "limit",
       (SELECT any_value(t.perplexity) FROM decode_tradeoff t
        WHERE (t.artifact, t.variant, t.provider, t.dtype) = (s.artifact, s.variant, s.provider, s.dtype)
          AND t.cutoff IS NOT DISTINCT FROM s.cutoff AND s.mask_source = 'recorded' AND s.kernel = 'decode')
         AS perplexity,
       s.rel_err, s.gate_passed AS gate, s.threads, s.timer, s.cache, s.d_model, s.d_ff, s.variant, s.note
FROM speed s JOIN run_artifacts r USING (artifact)
WHERE r.run_id = '{run}'
ORDER BY s.kernel = 'decode', s.variant IS NULL, s.kernel, s.num_tokens, s.mask_source = 'raised', s.mask_source,
         s.dtype DESC, s.sparsity,
         s.cutoff NULLS FIRST, s.p50_us DESC
"""
SAME = (
    "(u.artifact, u.kernel, u.provider, u.dtype, u.num_tokens) = (s.artifact, s.kernel, s.provider, s.dtype, "
    "s.num_tokens) AND row(u.variant, u.mask_source, u.sparsity, u.cutoff) IS NOT DISTINCT FROM "
    "row(s.variant, s.mask_source, s.sparsity, s.cutoff)"
)
TIMES = ("p20_us", "p50_us", "p80_us")
ALWAYS = ("provider", *TIMES)
"""Columns that stay though all their values are one."""
SAID_OF_MOST = ("d_model", "d_ff", "gate", "variant")
"""Columns that are said once where all rows that have a value have the same one."""
Rows = list[dict[str, Any]]


def bench_rows(ledger: Ledger, run_id: str) -> Rows:
    """Every timing of a run."""
    return ledger.query(SQL.format(run=run_id.replace("'", "''"), same=SAME)).records()


def bench_tables(rows: Rows) -> list[tuple[str, list[str], list[list[Any]], list[str]]]:
    """(title, columns, cells, notes) of the kernels and of decoding; what is alike in all rows of one goes into its
    title, what was noted of single rows is numbered.
    """
    parts = {
        "kernels": [r for r in rows if r["kernel"] != "decode"],
        "decoding": [r for r in rows if r["kernel"] == "decode"],
    }
    return [_table(name, found) for name, found in parts.items() if found]


def _table(name: str, rows: Rows) -> tuple[str, list[str], list[list[Any]], list[str]]:
    notes = list(dict.fromkeys(r["note"] for r in rows if r["note"]))
    kept, alike = [], []
    for column in rows[0]:
        values = {r[column] for r in rows}
        said = values - {None}
        if column == "note" or not said:
            continue
        if len(said if column in SAID_OF_MOST else values) == 1 and column not in ALWAYS:
            alike.append(f"{column} {said.pop()}")
        else:
            kept.append(column)
    cells = [[_readable(column, row[column]) for column in kept] for row in rows]
    if notes:
        for row, line in zip(rows, cells, strict=True):
            line.append(notes.index(row["note"]) + 1 if row["note"] else "")
    columns = [*kept, *(["note"] if notes else [])]
    return f"{name} · {', '.join(alike)}", columns, cells, [f"{i}. {note}" for i, note in enumerate(notes, start=1)]


def _readable(column: str, value: Any) -> Any:
    """Microseconds without a power of ten, and nothing where there is nothing to say."""
    if value is None:
        return "" if column in ("cutoff", "over_torch", "over_own_dense", "limit", "perplexity") else None
    return round(value) if column in TIMES and value >= 1000 else value
