"""Differences between variants that read the same documents, made when an evaluation is recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prosparse_core.paired import Scored, difference

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Row = dict[str, Any]
PERPLEXITY = "token_perplexity"
ALL = "all"
_SAME = ("task", "corpus", "metric", "part_of", "dtype", "num_fewshot", "window_tokens", "documents")
"""What two rows must have in common to be of the same documents, read in the same way."""


def difference_rows(con: DuckDBPyConnection, digest: str, scores: list[Row]) -> list[Row]:
    """Rows of ``differences`` between the variants of a new artifact and all those in the ledger already.

    Args:
        digest: of the artifact.
        scores: its rows of ``document_scores``.
    """
    listed = sorted({row["documents"] for row in scores})
    marks = ", ".join("?" for _ in listed)
    cursor = con.execute(f"SELECT * FROM document_scores WHERE documents IN ({marks})", listed)
    names = [column[0] for column in cursor.description or []]
    others = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    found: list[Row] = []
    for place, there in sorted(_by_variant(others).items()):
        for own, here in sorted(_by_variant(scores).items()):
            if own[1] != place[1]:
                found += _between((digest, own[1]), here, place, there)
    return found


def _by_variant(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["artifact"], row["variant"]), []).append(row)
    return found


def _between(own: tuple[str, str], here: list[Row], place: tuple[str, str], there: list[Row]) -> Iterator[Row]:
    """The original is what others are compared with; of two others, the one whose name comes first."""
    if _is_base(own[1], place[1]):
        own, here, place, there = place, there, own, here
    known = {tuple(row.get(key) for key in _SAME): row for row in there}
    pairs = [(row, known[key]) for row in here if (key := tuple(row.get(k) for k in _SAME)) in known]
    # Per token, only perplexities of the same tokens compare.
    pairs = [(a, b) for a, b in pairs if a["metric"] != PERPLEXITY or list(a["counts"]) == list(b["counts"])]
    for a, b in pairs:
        yield _row(own, place, a, [(a, b)], [1.0])
    corpora = [(a, b) for a, b in pairs if a["metric"] == PERPLEXITY]
    if corpora and all(_num(rows, "corpus") == len(corpora) for rows in (here, there)):
        shares = [a.get("share") for a, _ in corpora]
        known_shares = [share for share in shares if share is not None]
        weights = known_shares if len(known_shares) == len(shares) and sum(known_shares) > 0 else [1.0] * len(shares)
        yield _row(own, place, {"task": None, "corpus": ALL, "metric": PERPLEXITY}, corpora, weights)
    for group, metric in sorted({(a["part_of"], a["metric"]) for a, _ in pairs if a.get("part_of")}):
        parts = [(a, b) for a, b in pairs if (a.get("part_of"), a["metric"]) == (group, metric)]
        if all(_num(rows, "part_of", group) == len(parts) for rows in (here, there)):
            yield _row(own, place, {"task": group, "corpus": None, "metric": metric}, parts, [1.0] * len(parts))


def _is_base(one: str, other: str) -> bool:
    def order(variant: str) -> tuple[bool, str]:
        return (not variant.startswith("original@"), variant)

    return order(one) < order(other)


def _num(rows: list[Row], column: str, value: str | None = None) -> int:
    return sum(row.get(column) is not None and (value is None or row[column] == value) for row in rows)


def _row(
    own: tuple[str, str], place: tuple[str, str], what: Row, pairs: list[tuple[Row, Row]], weights: list[float]
) -> Row:
    scored = [tuple(Scored(row["documents"], row["sums"], row["counts"]) for row in pair) for pair in pairs]
    found = difference([(a, b) for a, b in scored], weights)
    is_ratio = what["metric"] == PERPLEXITY

    def shown(value: float | None) -> float | None:
        return math.exp(min(value, 700.0)) if value is not None and is_ratio else value

    return {
        "artifact": own[0],
        "variant": own[1],
        "base_artifact": place[0],
        "base": place[1],
        "task": what.get("task"),
        "corpus": what.get("corpus"),
        "metric": what["metric"],
        "unit": "ratio" if is_ratio else "fraction",
        "value": shown(found.value),
        "low": shown(found.low),
        "high": shown(found.high),
        "stderr": found.stderr,
        "num_documents": found.num_documents,
        "note": found.note,
    }
