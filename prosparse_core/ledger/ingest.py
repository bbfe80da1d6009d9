"""From a finished step folder to rows: ``artifact.json``, ``facts.jsonl`` and the training log."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import EnvironmentProblem, ProSparseError
from prosparse_core.ledger import schema
from prosparse_core.ledger.differences import difference_rows
from prosparse_core.store import FACTS, RECORD, dropped, read_record

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

log = logging.getLogger("prosparse.ledger")

LOGS = {
    "log.jsonl": ("train_metrics", ("stage", "step")),
    "held_out.jsonl": ("held_out_metrics", ("stage", "step", "corpus")),
    "events.jsonl": ("train_events", ("stage", "step")),
    "checkpoints.jsonl": ("checkpoint_writes", ("stage", "step")),
}
"""What a stage wrote down while it trained: file -> where it goes, and what makes a row unique."""
TABLES = {
    "variants": "variant_facts",
    "train_metrics": "train_metrics",
    "sparsity": "sparsity",
    "thresholds": "thresholds",
    "evaluations": "evaluations",
    "predictors": "predictors",
    "speed": "speed",
    "document_scores": "document_scores",
}
"""The names a line of facts.jsonl may give as its table, and where it goes."""
KEYS = {
    "variants": ("variant",),
    "sparsity": ("variant", "corpus", "layer"),
    "thresholds": ("variant", "rule", "scope", "threshold", "corpus"),
    "evaluations": ("variant", "task", "corpus", "metric", "num_fewshot", "limit"),
    "predictors": ("variant", "layer", "cutoff", "hidden", "label_rule"),
    "document_scores": ("variant", "task", "corpus", "metric", "num_fewshot"),
}
"""What makes a row of one artifact unique: two lines with equal keys would be one measurement told twice."""

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "VARCHAR": (str,),
    "BOOLEAN": (bool,),
    "BIGINT": (int,),
    "INTEGER": (int,),
    "DOUBLE": (int, float),
    "DOUBLE[]": (list,),
}

Row = dict[str, Any]


@dataclass
class _Facts:
    """The rows of one artifact by table, with the line each came from."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    seen: dict[tuple[Any, ...], str] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)
    """Variant -> the first line that uses it."""


def ingest_artifact(con: DuckDBPyConnection, folder: Path, home: Path) -> bool:
    """Add one artifact and its facts to the open ledger; False when it was there already.

    Raises:
        ProSparseError: a line of its facts fits no table; names file and line. Nothing is added.
    """
    record = read_record(folder)
    try:
        row = _artifact_row(record, folder, home)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProSparseError(
            f"{folder / RECORD}: not a whole artifact record: {type(error).__name__} {error}",
            hint=f"delete the folder {folder}; the next run makes it again",
        ) from error
    _note_retention(con, record, folder)
    known = con.execute("SELECT fingerprint FROM artifacts WHERE digest = ?", [row["digest"]]).fetchall()
    if (row["fingerprint"],) in known:
        return False
    if not known:
        facts = _read_facts(con, folder, row["digest"]).rows
        scores = facts.get("document_scores", [])
        if scores and (differences := difference_rows(con, row["digest"], scores)):
            _insert(con, "differences", differences, folder, home)
        for table, rows in facts.items():
            _insert(con, TABLES.get(table, table), rows, folder, home)
    con.execute(
        f"INSERT INTO artifacts ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
        list(row.values()),
    )
    for role, made in record["inputs"].items():
        edge = [row["digest"], row["step"], role, made["digest"], made.get("step"), made.get("fingerprint")]
        key = [edge[0], edge[2], edge[3]]
        if not con.execute("FROM lineage WHERE (artifact, role, input) = (?, ?, ?)", key).fetchone():
            con.execute("INSERT INTO lineage VALUES (?, ?, ?, ?, ?, ?)", edge)
    return True


def _note_retention(con: DuckDBPyConnection, record: Row, folder: Path) -> None:
    """What a retention rule took from the artifact, and what is there again, as far as the ledger does not know it."""
    gone = dropped(folder)
    sizes = {f["path"]: f["bytes"] for f in record["files"]}
    sql = "SELECT path FROM dropped WHERE artifact = ?"
    known = {path for (path,) in con.execute(sql, [record["digest"]]).fetchall()}
    add = "INSERT INTO retention VALUES (?, ?, ?, ?, ?, ?)"
    for path in sorted(set(gone) - known):
        at = datetime.fromisoformat(gone[path]["dropped_at"]).astimezone(UTC).replace(tzinfo=None)
        con.execute(add, [record["digest"], path, "dropped", gone[path]["bytes"], at, gone[path]["reason"]])
    for path in sorted(known - set(gone)):
        con.execute(add, [record["digest"], path, "made again", sizes.get(path, 0), schema.now(), None])


def ingest_store(con: DuckDBPyConnection, store: Path, home: Path) -> int:
    """Add every finished artifact under ``store``, oldest first, each in its own transaction; how many were added.

    An artifact that cannot be read is left out, aloud.
    """
    found = []
    for folder in _artifact_folders(store):
        try:
            found.append((_created_at(read_record(folder), folder), folder))
        except (ProSparseError, AttributeError, TypeError, ValueError) as error:
            log.warning("left out of the ledger: %s", error)
    added = 0
    for _, folder in sorted(found):
        con.execute("BEGIN")
        try:
            added += ingest_artifact(con, folder, home)
            con.execute("COMMIT")
        except EnvironmentProblem:
            raise
        except ProSparseError as error:
            con.execute("ROLLBACK")
            log.warning("left out of the ledger: %s", error)
    return added


def _artifact_folders(store: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(store):
        if RECORD in files:
            subfolders.clear()
            yield Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def _artifact_row(record: dict[str, Any], folder: Path, home: Path) -> Row:
    folder, home = folder.resolve(), home.resolve()
    return {
        "digest": str(record["digest"]),
        "fingerprint": str(record["fingerprint"]),
        "step": str(record["step"]),
        "label": str(record["label"]),
        "path": str(folder.relative_to(home) if folder.is_relative_to(home) else folder),
        "bytes": sum(f["bytes"] for f in record["files"]),
        "num_files": len(record["files"]),
        "created_at": _created_at(record, folder),
        "wall_s": record["provenance"].get("wall_s"),
        "payload": json.dumps(record["payload"]),
        "provenance": json.dumps(record["provenance"]),
        "meta": json.dumps(_clean(record["meta"])),
    }


def _created_at(record: dict[str, Any], folder: Path) -> datetime:
    """UTC; the time of the record file where the provenance does not say."""
    said = record["provenance"].get("created_at") if isinstance(record.get("provenance"), dict) else None
    when = datetime.fromisoformat(said) if said else datetime.fromtimestamp((folder / RECORD).stat().st_mtime, UTC)
    return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when


def _read_facts(con: DuckDBPyConnection, folder: Path, digest: str) -> _Facts:
    facts = _Facts()
    known = {name: _columns(con, table) for name, table in TABLES.items()}
    path = folder / FACTS
    if path.is_file():
        for place, text in _lines(path):
            _add_fact(facts, place, text, known)
    for name, (table, key) in LOGS.items():
        path = folder / name
        if path.is_file():
            _add_log(facts, path, table, key, known.get(table) or _columns(con, table))
    _declare_variants(con, facts)
    for rows in facts.rows.values():
        for row in rows:
            row["artifact"] = digest
    return facts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProSparseError(f"{path} is not readable: {error.strerror}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _add_fact(facts: _Facts, place: str, text: str, known: dict[str, dict[str, tuple[str, bool]]]) -> None:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ProSparseError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ProSparseError(f"{place}: a fact is an object, this is {type(row).__name__}")
    table = row.pop("table", None)
    if table not in known:
        raise ProSparseError(f"{place}: unknown table {table!r}", hint=_nearest(str(table), known))
    row = {schema.RENAMED.get((table, column), column): value for column, value in row.items()}
    row = _typed(row, known[table], place, table)
    if table in KEYS:
        key = (table, *(row.get(column) for column in KEYS[table]))
        if key in facts.seen:
            if table == "variants" and row in facts.rows["variants"]:
                return
            raise ProSparseError(f"{place}: the same {table} row as {facts.seen[key]}: {KEYS[table]} = {key[1:]}")
        facts.seen[key] = place
    if table != "variants" and row.get("variant") is not None:
        facts.uses.setdefault(row["variant"], place)
    facts.rows.setdefault(table, []).append(row)


def _columns(con: DuckDBPyConnection, table: str) -> dict[str, tuple[str, bool]]:
    return {name: kind for name, kind in schema.columns(con, table).items() if name != "artifact"}


def _add_log(facts: _Facts, path: Path, table: str, key: tuple[str, ...], known: dict[str, tuple[str, bool]]) -> None:
    """The last row of every step counts: a resumed stage may log a step again. Torn lines are left out, aloud."""
    latest: dict[tuple[Any, ...], Row] = {}
    for place, text in _lines(path):
        try:
            row = json.loads(text)
            torn = not isinstance(row, dict)
        except ValueError:
            torn = True
        if torn:
            log.warning("%s: torn line left out of the ledger", place)
            continue
        row = _typed(row, known, place, table)
        which = tuple(row.get(column) for column in key)
        latest.pop(which, None)
        latest[which] = row
    if latest:
        facts.rows.setdefault(table, []).extend(latest.values())


def _typed(row: Row, known: dict[str, tuple[str, bool]], place: str, table: str) -> Row:
    """The row with every value checked against its column; NaN and infinities become NULL."""
    for column in row:
        if column not in known:
            raise ProSparseError(f"{place}: {table} has no column {column!r}", hint=_nearest(column, known))
    typed = {}
    for column, (kind, nullable) in known.items():
        value = _clean(row.get(column))
        if value is None:
            if not nullable:
                raise ProSparseError(f"{place}: {table}.{column} is required")
            continue
        if kind in ("BIGINT", "INTEGER") and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, _PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise ProSparseError(f"{place}: {table}.{column} is a {kind}, not {value!r}")
        if isinstance(value, list) and not all(type(item) in (int, float) for item in value):
            raise ProSparseError(f"{place}: {table}.{column} is a list of finite numbers, not {str(value)[:80]}")
        typed[column] = value
    return typed


def _clean(value: Any) -> Any:
    """NaN and infinities as None, at any depth: JSON and SQL averages have no place for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value


def _declare_variants(con: DuckDBPyConnection, facts: _Facts) -> None:
    """Every variant measured is described in the same artifact: in its own lines, or as it was described before."""
    declared = {row["variant"] for row in facts.rows.get("variants", [])}
    for variant, place in facts.uses.items():
        if variant in declared:
            continue
        cursor = con.execute("SELECT * EXCLUDE (artifact) FROM variant_facts WHERE variant = ? LIMIT 1", [variant])
        names = [column[0] for column in cursor.description or []]
        found = cursor.fetchone()
        if found is None:
            raise ProSparseError(
                f"{place}: measures variant {variant!r}, which nothing has described",
                hint='add a line {"table": "variants", "variant": ..., "model": ..., "setting": ...}',
            )
        facts.rows.setdefault("variants", []).append(dict(zip(names, found, strict=True)))


def _insert(con: DuckDBPyConnection, table: str, rows: list[Row], folder: Path, home: Path) -> None:
    """One bulk insert: duckdb reads JSON lines 300 times as fast as it takes single rows."""
    import duckdb

    scratch = home / ".ledger" / "ingest.jsonl"
    try:
        with open(scratch, "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        kinds = {column: kind for column, (kind, _) in schema.columns(con, table).items()}
        wanted = ", ".join(f"{schema.text_literal(c)}: {schema.text_literal(k)}" for c, k in kinds.items())
        con.execute(
            f'INSERT INTO "{table}" BY NAME SELECT * FROM '
            f"read_json(?, format = 'newline_delimited', columns = {{{wanted}}})",
            [str(scratch)],
        )
    except duckdb.ConstraintException as error:
        raise ProSparseError(f"{folder / FACTS}: a {table} row breaks a rule: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _nearest(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
