"""Writing runs, steps and facts down, and asking for them."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, EnvironmentProblem, ProSparseError
from prosparse_core.ledger.files import LedgerFiles
from prosparse_core.ledger.schema import now, signature
from prosparse_core.ledger.table import Table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_reading = threading.Lock()
_READS = 5
"""Of a snapshot that a writer replaces again and again while it is opened."""
"""duckdb shares one instance per path within a process: a second reader would see the first one's older snapshot."""
_DIED = "process died"
_READER_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
}


class Ledger:
    """The ledger of one home folder. Every method opens, does its work, publishes and closes: nothing stays locked."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home)
        self._files = LedgerFiles(self.home)
        self._together = threading.local()

    @property
    def path(self) -> Path:
        """The published snapshot: what people open."""
        return self._files.public

    def exists(self) -> bool:
        """Whether anything was ever recorded here."""
        return self._files.public.exists() or self._files.private.exists()

    def bring_up_to_date(self) -> None:
        """Give a ledger that an older version wrote the views of this one; a current one is left as it is.

        Writing does so by itself. This is for reading what this version asks for; where we may not write, or a newer
        version wrote, the ledger stays as it is.
        """
        if self.exists() and self.query("SELECT signature FROM schema_version").rows != [(signature(),)]:
            with contextlib.suppress(EnvironmentProblem), self._write():
                pass

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Several writes of this thread as one: all are published when the block is left, or none is."""
        with self._files.write() as con:
            self._together.con = con
            try:
                yield
            finally:
                self._together.con = None

    @contextlib.contextmanager
    def _write(self) -> Iterator[DuckDBPyConnection]:
        con = getattr(self._together, "con", None)
        if con is not None:
            yield con
            return
        with self._files.write() as con:
            yield con

    def start_run(
        self,
        *,
        run_id: str,
        flow: str,
        recipe: str,
        recipe_yaml: str,
        overrides: list[str],
        model: str,
        provenance: dict[str, Any],
    ) -> None:
        """Write down that a run began; ``host`` and ``pid`` of the provenance get columns of their own.

        Raises:
            BadInput: another run has this id.
        """
        with self._write() as con:
            found = con.execute("SELECT flow, recipe_yaml FROM run_starts WHERE run_id = ?", [run_id]).fetchone()
            if found == (flow, recipe_yaml):
                return
            if found:
                raise BadInput(f"there is already a run {run_id!r} in {self.path}", hint="give the new run another id")
            con.execute(
                "INSERT INTO run_starts (run_id, flow, recipe, recipe_yaml, overrides, model, host, pid, started_at, "
                "provenance) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    *(run_id, flow, recipe, recipe_yaml, list(overrides), model),
                    *(provenance.get("host"), provenance.get("pid"), now(), json.dumps(provenance, default=str)),
                ],
            )

    def end_run(self, run_id: str, status: str, error: str | None = None) -> None:
        """Write down how a run ended: ``done`` or ``failed``. Told twice, the later word counts."""
        assert status in ("done", "failed"), status
        with self._write() as con:
            _require(con, "run_starts", "run_id", run_id)
            _end_run(con, run_id, status, error)

    def start_step(self, run_id: str, *, step: str, stage: int | None, label: str, fingerprint: str) -> str:
        """Write down that a step began; returns its id, ``<run_id>/<number>-<step>``."""
        with self._write() as con:
            _require(con, "run_starts", "run_id", run_id)
            row = con.execute("SELECT count(*) + 1 FROM step_starts WHERE run_id = ?", [run_id]).fetchone()
            assert row is not None
            step_id = f"{run_id}/{row[0]:02d}-{step}"
            con.execute(
                "INSERT INTO step_starts (step_id, run_id, step, stage, label, fingerprint, started_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [step_id, run_id, step, stage, label, fingerprint, now()],
            )
        return step_id

    def end_step(
        self,
        step_id: str,
        *,
        status: str,
        artifact: str | None = None,
        error: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Write down how a step ended: ``done`` or ``cached`` with the digest of its artifact, or ``failed``."""
        assert status in ("done", "cached", "failed"), status
        assert status == "failed" or artifact, "a step that succeeds leaves an artifact"
        with self._write() as con:
            _require(con, "step_starts", "step_id", step_id)
            _end_step(con, step_id, status, artifact, error, hint)

    def record_artifact(self, folder: Path) -> None:
        """Read a finished step folder into the ledger; does nothing when it is there already.

        Raises:
            ProSparseError: a line of ``facts.jsonl`` names an unknown table or column, lacks a required one, or has a
                value of the wrong type; the message names file and line, and nothing of the folder is recorded.
        """
        from prosparse_core.ledger import ingest

        with self._write() as con:
            ingest.ingest_artifact(con, Path(folder), self.home)

    def mark_dead_runs(self, is_alive: Callable[[dict[str, Any]], bool]) -> list[str]:
        """End every running run whose process is gone as failed; returns their ids.

        Args:
            is_alive: judges a run by ``run_id, flow, recipe, model, host, pid, started_at`` and its ``provenance``.
        """
        if not self.exists():
            return []
        sql = "SELECT run_id, flow, recipe, model, host, pid, started_at, provenance FROM runs WHERE status = 'running'"
        dead = [run["run_id"] for run in self.query(sql).records() if not is_alive(run)]
        if dead:
            with self._write() as con:
                still = "WHERE status = 'running' AND run_id IN (SELECT unnest(?)) ORDER BY started_at"
                for (step_id,) in con.execute(f"SELECT step_id FROM steps {still}", [dead]).fetchall():
                    _end_step(con, step_id, "failed", None, _DIED, "run the same command again: it goes on from here")
                dead = [run_id for (run_id,) in con.execute(f"SELECT run_id FROM runs {still}", [dead]).fetchall()]
                for run_id in dead:
                    _end_run(con, run_id, "failed", _DIED)
        return dead

    def rebuild(self, store: Path) -> int:
        """Make the ledger anew from the ``artifact.json`` files under ``store``; returns how many there were.

        What no artifact holds, the history of runs and steps, is taken over from the ledger as far as it is readable.
        """
        return self._files.rebuild(Path(store))

    def query(self, sql: str) -> Table:
        """Run SQL on the published snapshot, read-only.

        Raises:
            BadInput: there is no ledger yet, or duckdb refuses the statement (its message is passed on).
            EnvironmentProblem: the snapshot cannot be opened.
        """
        import duckdb

        for attempt in range(_READS):
            before = _file(self.path)
            try:
                return self._ask(sql)
            except duckdb.Error as error:
                # DuckDB opens a file more than once: one that was replaced in between does not fit together.
                was_replaced = isinstance(error, duckdb.IOException) and _file(self.path) != before
                if attempt == _READS - 1 or not was_replaced:
                    raise _refused(error, self.path) from error
        raise AssertionError("unreachable")

    def _ask(self, sql: str) -> Table:
        with _reading, self._snapshot() as con:
            cursor = con.execute(sql)
            if cursor is None or cursor.description is None:
                raise BadInput("there is no statement to run", hint='for example: "FROM leaderboard"')
            described = cursor.description
            rows = cursor.fetchall()
        return Table([c[0] for c in described], rows, [str(c[1]) for c in described])

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[DuckDBPyConnection]:
        import duckdb

        path = self._files.readable()
        if path is None:
            raise BadInput(f"there is no ledger at {self.path} yet", hint="run something first, or set PROSPARSE_HOME")
        try:
            con = duckdb.connect(str(path), read_only=True, config=_READER_CONFIG)
        except duckdb.Error:
            with self._copy(path) as con:
                yield con
            return
        try:
            yield con
        finally:
            con.close()

    @contextlib.contextmanager
    def _copy(self, path: Path) -> Iterator[DuckDBPyConnection]:
        """Somebody holds the snapshot open for writing, which shuts everybody else out of that file: read a copy."""
        import duckdb

        with tempfile.TemporaryDirectory(prefix="prosparse-ledger-") as folder:
            copy = Path(folder) / path.name
            try:
                shutil.copyfile(path, copy)
                con = duckdb.connect(str(copy), read_only=True, config=_READER_CONFIG)
            except (OSError, duckdb.Error) as error:
                raise EnvironmentProblem(
                    f"{path} cannot be opened: {error}", hint=f"delete {path}; the next query publishes it anew"
                ) from error
            try:
                yield con
            finally:
                con.close()


def _require(con: DuckDBPyConnection, table: str, column: str, value: str) -> None:
    if con.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", [value]).fetchone() is None:
        raise ProSparseError(f"the ledger knows no {column} {value!r}")


def _end_run(con: DuckDBPyConnection, run_id: str, status: str, error: str | None) -> None:
    row = [run_id, status, now(), error]
    con.execute("INSERT INTO run_ends (run_id, status, ended_at, error) VALUES (?, ?, ?, ?)", row)


def _end_step(
    con: DuckDBPyConnection, step_id: str, status: str, artifact: str | None, error: str | None, hint: str | None
) -> None:
    con.execute(
        "INSERT INTO step_ends (step_id, status, artifact, ended_at, error, hint) VALUES (?, ?, ?, ?, ?, ?)",
        [step_id, status, artifact, now(), error, hint],
    )


def _refused(error: Exception, path: Path) -> ProSparseError:
    """Which of the user's or the machine's faults a duckdb error is."""
    import duckdb

    text = str(error)
    if isinstance(error, duckdb.OutOfMemoryException):
        return EnvironmentProblem(f"the query needs more memory than there is: {text}")
    if "read-only mode" in text:
        return BadInput(
            f"the ledger is only read here: {text}",
            hint="to keep tables of your own, ATTACH it (READ_ONLY) from a database file of yours",
        )
    if isinstance(error, duckdb.PermissionException):
        return BadInput(text, hint=f"a query here touches no other files; for that: duckdb -readonly {path}")
    if isinstance(error, duckdb.IOException | duckdb.InternalException | duckdb.FatalException):
        return EnvironmentProblem(f"{path} cannot be read: {text}", hint=f"delete {path}; it is published anew")
    return BadInput(text, hint='"SHOW TABLES" lists what there is; "DESCRIBE results" its columns')


def _file(path: Path) -> tuple[int, int] | None:
    """Which file is at this place now."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
