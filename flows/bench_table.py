"""The tables ``prosparse bench`` closes with: every timing of a run beside every condition it was taken under, and a
mark with its explanation at every number that is above what should bound it.
"""

from __future__ import annotations

from typing import Any

from prosparse_core.ledger import Ledger

SQL = """
SELECT s.kernel, s.provider, s.dtype, s.num_tokens AS tokens, s.prompt_tokens AS prompt, s.mask_source AS masks,
       round(s.sparsity, 4) AS zeros,
       round(s.live_frac, 4) AS live, s.cutoff, s.p20_us, s.p50_us, s.p80_us, s.num_reps AS reps,
       round(s.gbps, 2) AS gbps, round(s.bandwidth_share, 3) AS of_ceiling,
       round(u.speedup, 3) AS speedup, u.baseline AS best_dense, round(u.byte_ratio, 3) AS byte_ratio,
       u.above_byte_ratio,
       (SELECT any_value(t.perplexity) FROM decode_tradeoff t
        WHERE (t.artifact, t.variant, t.provider, t.dtype) = (s.artifact, s.variant, s.provider, s.dtype)
          AND t.cutoff IS NOT DISTINCT FROM s.cutoff AND s.mask_source = 'recorded' AND s.kernel = 'decode')
         AS perplexity,
       s.rel_err, s.gate_passed AS gate, s.threads, s.timer, s.cache, s.d_model, s.d_ff, s.variant,
       nullif(concat_ws('; ', s.note, 'byte ratio ' || s.byte_ratio_note, u.above_byte_ratio_note,
         CASE WHEN s.bandwidth_share > 1 THEN 'above the ceiling: memory was never seen to be read as fast' END), '')
         AS note
FROM speed s JOIN run_artifacts r USING (artifact)
LEFT JOIN speedup u
  ON u.is_best AND u.run_id = r.run_id
  AND (u.artifact, u.kernel, u.provider, u.dtype, u.num_tokens)
    = (s.artifact, s.kernel, s.provider, s.dtype, s.num_tokens)
  AND row(u.variant, u.mask_source, u.sparsity, u.cutoff, u.prompt_tokens, u.layer)
    IS NOT DISTINCT FROM row(s.variant, s.mask_source, s.sparsity, s.cutoff, s.prompt_tokens, s.layer)
WHERE r.run_id = '{run}'
ORDER BY s.kernel = 'decode', s.variant IS NULL, s.kernel, s.num_tokens, s.prompt_tokens NULLS FIRST,
         s.mask_source = 'raised', s.mask_source,
         s.dtype DESC, s.sparsity,
         s.cutoff NULLS FIRST, s.p50_us DESC
"""
TIMES = ("p20_us", "p50_us", "p80_us")
ALWAYS = ("provider", *TIMES)
"""Columns that stay though all their values are one."""
SAID_OF_MOST = ("d_model", "d_ff", "gate", "variant")
"""Columns that are said once where all rows that have a value have the same one."""
ABOVE = "!"
"""Marks a speed-up above its byte ratio, and a rate above the ceiling."""
Rows = list[dict[str, Any]]


def bench_rows(ledger: Ledger, run_id: str) -> Rows:
    """Every timing of a run, beside the best dense kernel under its conditions: ``speedup``, ``best_dense``."""
    return ledger.query(SQL.format(run=run_id.replace("'", "''"))).records()


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
        is_absent = column == "byte_ratio" and any(r["best_dense"] for r in rows)
        if column in ("note", "above_byte_ratio") or not (said or is_absent):
            continue
        if len(said if column in SAID_OF_MOST else values) == 1 and column not in ALWAYS and not is_absent:
            alike.append(f"{column} {said.pop()}")
        else:
            kept.append(column)
    cells = [[_readable(column, row) for column in kept] for row in rows]
    if notes:
        for row, line in zip(rows, cells, strict=True):
            line.append(notes.index(row["note"]) + 1 if row["note"] else "")
    columns = [*kept, *(["note"] if notes else [])]
    return f"{name} · {', '.join(alike)}", columns, cells, [f"{i}. {note}" for i, note in enumerate(notes, start=1)]


def _readable(column: str, row: dict[str, Any]) -> Any:
    """Microseconds without a power of ten, nothing where there is nothing to say, and a mark where a number is above
    what it stands beside; the notes explain marks and what is n/a.
    """
    value = row[column]
    if column == "byte_ratio" and value is None and row["best_dense"]:
        return "n/a"
    if value is None:
        return "" if column in ("cutoff", "speedup", "best_dense", "byte_ratio", "perplexity") else None
    is_above = (column == "speedup" and row["above_byte_ratio"]) or (column == "of_ceiling" and value > 1)
    return f"{value:g} {ABOVE}" if is_above else round(value) if column in TIMES and value >= 1000 else value
