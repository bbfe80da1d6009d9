"""The schema of a ledger file: made, described, checked, and carried over from an older file."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prosparse_core.errors import EnvironmentProblem

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SCHEMA_VERSION = 1
"""Raised only when a column changes its meaning; columns and views may grow without."""
STORAGE_VERSION = "v1.0.0"
"""Files in this format open in every duckdb since 1.0."""
WRITER_CONFIG: dict[str, str | bool | int | float | list[str]] = {"threads": 1, "autoinstall_known_extensions": False}
HISTORY = ("run_starts", "run_ends", "step_starts", "step_ends")
"""The tables the store's artifacts do not hold."""
RENAMED = {("speed", "limit_speedup"): "byte_ratio"}
"""Columns of older ledgers and artifacts by table, and what they are called now; they mean the same."""
_CARRIED_BY_CODE = ("schema_version", "published")
_SQL = ("schema.sql", "views.sql", "paper.sql", "comparison.sql", "held_out.sql", "training.sql")
_CSV = ("columns.csv", "published.csv")
_HERE = Path(__file__).parent


class DamagedLedger(Exception):
    """A ledger file that opens but does not hold what it should."""


@cache
def signature() -> str:
    """Hash of the files that define the schema, the views, the comments and the published numbers."""
    return hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in (*_SQL, *_CSV))).hexdigest()


def now() -> datetime:
    """The present in UTC without a zone, as every time in the ledger."""
    return datetime.now(UTC).replace(tzinfo=None)


def create(path: Path) -> None:
    """Write an empty ledger with views, comments and the published numbers to ``path``, which must not exist."""
    import duckdb

    with duckdb.connect(config=WRITER_CONFIG) as con:
        con.execute(f"ATTACH {text_literal(path)} AS ledger (STORAGE_VERSION '{STORAGE_VERSION}')")
        con.execute("USE ledger")
        con.execute("BEGIN")
        for name in _SQL:
            con.execute((_HERE / name).read_text(encoding="utf-8"))
        _comment_columns(con)
        con.execute(
            "INSERT INTO published BY NAME SELECT * REPLACE (coalesce(condition, '') AS condition) "
            f"FROM read_csv({text_literal(_HERE / 'published.csv')}, header = true, types = {{'value': 'DOUBLE'}})"
        )
        con.execute("INSERT INTO schema_version VALUES (?, ?, ?)", [SCHEMA_VERSION, signature(), now()])
        con.execute("COMMIT")
        con.execute("CHECKPOINT ledger")
        con.execute("USE memory")
        con.execute("DETACH ledger")


def is_current(con: DuckDBPyConnection, path: Path) -> bool:
    """Whether an open ledger has exactly this code's schema and views.

    Raises:
        DamagedLedger: it is no ledger.
        EnvironmentProblem: a newer version of the product wrote it.
    """
    import duckdb

    try:
        found = con.execute("SELECT version, signature FROM schema_version").fetchone()
    except duckdb.CatalogException as error:
        raise DamagedLedger("it has no table schema_version") from error
    if found is None:
        raise DamagedLedger("its table schema_version is empty")
    if found[0] > SCHEMA_VERSION:
        raise _newer(path, f"schema version {found[0]}, this one knows {SCHEMA_VERSION}")
    return bool(found[1] == signature())


def read_all(con: DuckDBPyConnection) -> None:
    """Read every block of every table; raises what duckdb raises when one is damaged."""
    for table in tables(con):
        con.execute(f'SELECT bit_xor(hash(t)) FROM "{table}" AS t').fetchone()


def carry_over(con: DuckDBPyConnection, old: Path, only: Iterable[str] | None = None) -> None:
    """Add the rows of another ledger file to the open one, by column name, in one transaction.

    Args:
        only: these tables; None is every table except those the code itself fills.

    Raises:
        EnvironmentProblem: the old file has a column this code does not know: nothing may be dropped.
    """
    con.execute(f"ATTACH {text_literal(old)} AS old (READ_ONLY)")
    try:
        con.execute("BEGIN")
        wanted = [t for t in tables(con, "old") if t not in _CARRIED_BY_CODE and (only is None or t in only)]
        here = tables(con)
        for table in wanted:
            names = columns(con, table, "old")
            now_called = {name: RENAMED.get((table, name), name) for name in names}
            unknown = sorted(set(now_called.values()) - set(columns(con, table))) if table in here else ["(the table)"]
            if unknown:
                raise _newer(old, f"{table} has {', '.join(unknown)}, which this one does not know")
            listed = ", ".join(f'"{name}"' for name in names)
            into = ", ".join(f'"{name}"' for name in now_called.values())
            con.execute(f'INSERT INTO "{table}" ({into}) SELECT {listed} FROM old."{table}"')
        con.execute("COMMIT")
    except BaseException:
        con.execute("ROLLBACK")
        raise
    finally:
        con.execute("DETACH old")


def tables(con: DuckDBPyConnection, database: str | None = None) -> list[str]:
    """The base tables of the open ledger, or of an attached one."""
    sql = (
        "SELECT table_name FROM duckdb_tables() "
        "WHERE database_name = coalesce(?, current_database()) AND NOT temporary ORDER BY table_name"
    )
    return [row[0] for row in con.execute(sql, [database]).fetchall()]


def columns(con: DuckDBPyConnection, table: str, database: str | None = None) -> dict[str, tuple[str, bool]]:
    """SQL type and whether NULL is allowed, by column, in order."""
    sql = (
        "SELECT column_name, data_type, is_nullable FROM duckdb_columns() "
        "WHERE database_name = coalesce(?, current_database()) AND table_name = ? ORDER BY column_index"
    )
    return {name: (kind, bool(nullable)) for name, kind, nullable in con.execute(sql, [database, table]).fetchall()}


def text_literal(value: object) -> str:
    """``value`` as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def _comment_columns(con: DuckDBPyConnection) -> None:
    text = (_HERE / "columns.csv").read_text(encoding="utf-8")
    meanings = {row["column"]: row["comment"] for row in csv.DictReader(text.splitlines())}
    known = con.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal AND database_name = current_database()"
    ).fetchall()
    statements = []
    for table, column in known:
        meaning = meanings.get(f"{table}.{column}", meanings.get(column))
        assert meaning is not None, f"columns.csv says nothing of {table}.{column}"
        statements.append(f'COMMENT ON COLUMN "{table}"."{column}" IS {text_literal(meaning)};')
    con.execute("\n".join(statements))


def _newer(path: Path, what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the ledger {path} was written by a newer version of prosparse ({what})",
        hint="update prosparse, or set PROSPARSE_HOME to another folder",
    )
