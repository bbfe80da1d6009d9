"""The two files of a ledger: a private one that is written, and the published snapshot that people open.

duckdb lets one process write or many read, never both, so readers get a file nobody writes: every write goes
lock -> private file -> CHECKPOINT -> copy -> fsync -> rename over ``ledger.duckdb``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import EnvironmentProblem, ProSparseError
from prosparse_core.ledger import ingest, schema
from prosparse_core.store import CHUNK, make_folder, write_json

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

log = logging.getLogger("prosparse.ledger")

LOCK_TIMEOUT_S = 300.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LedgerFiles:
    """Opens the private file for writing and publishes it; every public method is safe against kill -9."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.public = home / "ledger.duckdb"
        self.folder = home / ".ledger"
        self.private = self.folder / "private.duckdb"
        self._stamp_file = self.folder / "published.json"

    @contextlib.contextmanager
    def write(self) -> Iterator[DuckDBPyConnection]:
        """An open transaction on the private file; it is durable and published when the block is left.

        Raises:
            EnvironmentProblem: the disk is full or not writable, or the ledger is of a newer version.
        """
        with self._explained(), self._locked():
            con = self._open()
            try:
                con.execute("BEGIN")
                yield con
                con.execute("COMMIT")
                if _wal(self.private).exists():  # something was written
                    con.execute("CHECKPOINT")
            finally:
                con.close()  # rolls back what was not committed
            self._publish()

    def rebuild(self, store: Path) -> int:
        """Make the ledger anew from the artifacts of ``store``; only the history of runs is taken over. How many."""
        with self._explained(), self._locked():
            added = self._make([(self.private, schema.HISTORY), (self.public, schema.HISTORY)], store)
            self._publish()
            return added

    def readable(self) -> Path | None:
        """The published snapshot, published anew if somebody wrote to it; None when nothing was ever recorded."""
        if not self.private.exists() and not self.public.exists():
            return None
        if self._is_foreign() or not self.public.exists():
            # Where we may not write, what is there is still better than nothing.
            with contextlib.suppress(EnvironmentProblem), self.write():
                pass
        return self.public if self.public.exists() else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the lock dies with its process."""
        make_folder(self.folder)
        with open(self.folder / "lock", "a+", encoding="utf-8") as handle:
            give_up = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        handle.seek(0)
                        raise EnvironmentProblem(
                            f"the ledger {self.public} has been locked for {LOCK_TIMEOUT_S:.0f} s",
                            hint=f"see whether process {handle.read()} hangs",
                        ) from None
                    time.sleep(0.01)
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    def _open(self) -> DuckDBPyConnection:
        """The private file, current and whole: made, mended or brought up to date first if need be."""
        import duckdb

        if not self.private.exists():
            self._make([(self.public, None)], self.home / "store")
        try:
            con = duckdb.connect(str(self.private), config=schema.WRITER_CONFIG)
            try:
                if self._stamp().get("private") != _identity(self.private):
                    schema.read_all(con)
                if schema.is_current(con, self.private):
                    return con
            except BaseException:
                con.close()
                raise
            con.close()
            self._make([(self.private, None), (self.public, None)], None)
        except (duckdb.Error, schema.DamagedLedger) as error:
            if "Could not set lock" in str(error) or isinstance(error, duckdb.ConnectionException):
                raise EnvironmentProblem(
                    f"{self.private} is open in another program: {error}",
                    hint=f"close it there; {self.public} is the file to look at",
                ) from error
            self._mend(str(error))
        return duckdb.connect(str(self.private), config=schema.WRITER_CONFIG)

    def _mend(self, reason: str) -> None:
        kept = self._aside(self.private, "damaged")
        log.warning(
            "the ledger's own file %s is damaged (%s): making it again from %s and the store; it is kept as %s",
            *(self.private, reason.splitlines()[0], self.public.name, kept.name),
        )
        # A snapshot that is what we published holds every acknowledged row; any other is trusted for run history only.
        self._make([(self.public, schema.HISTORY if self._is_foreign() else None)], self.home / "store")

    def _make(self, sources: Iterable[tuple[Path, Iterable[str] | None]], store: Path | None) -> int:
        """Make a private file from the first readable source and from the store, then rename it into place."""
        import duckdb

        new = self.folder / "new.duckdb"
        _remove(new)
        schema.create(new)
        with duckdb.connect(str(new), config=schema.WRITER_CONFIG) as con:
            for path, only in sources:
                if not path.exists():
                    continue
                try:
                    self._carry_over(con, path, only)
                    break
                except duckdb.Error as error:
                    log.warning(
                        "%s is not readable (%s): runs recorded only there are lost; it is kept as %s",
                        *(path, error, self._aside(path, "unreadable").name),
                    )
            added = ingest.ingest_store(con, store, self.home) if store is not None else 0
            con.execute("CHECKPOINT")
        _wal(self.private).unlink(missing_ok=True)
        os.replace(new, self.private)
        _sync_folder(self.folder)
        return added

    def _carry_over(self, con: DuckDBPyConnection, path: Path, only: Iterable[str] | None) -> None:
        """From a copy: the file itself may be open elsewhere."""
        copy = self.folder / "old.duckdb"
        _remove(copy)
        try:
            shutil.copyfile(path, copy)
            if path == self.private and _wal(path).exists():
                shutil.copyfile(_wal(path), _wal(copy))
            schema.carry_over(con, copy, only)
        finally:
            _remove(copy)

    def _publish(self) -> None:
        """Copy the private file over the published one, unless that is what is published already."""
        stamp, private = self._stamp(), _identity(self.private)
        foreign = self._is_foreign()
        newest = stamp.get("public", [{}])[0]
        if not foreign and stamp.get("private") == private and _identity(self.public) == _triple(newest):
            return
        new = self.folder / "publish.duckdb"
        _remove(new)
        try:
            sha256 = _copy(self.private, new)
            if foreign:
                self._keep_foreign()
            published = {**(_identity(new) or {}), "sha256": sha256}
            # Written before the rename, beside its predecessor: a kill in between leaves a file still known as ours.
            write_json(self._stamp_file, {"public": [published, *stamp.get("public", [])[:1]], "private": private})
            _wal(self.public).unlink(missing_ok=True)
            os.replace(new, self.public)
            _sync_folder(self.home)
        finally:
            _remove(new)

    def _keep_foreign(self) -> None:
        kept = self._aside(self.public, "changed")
        log.warning(
            "somebody wrote to %s, which is only a copy and is published anew; what they made of it is kept as %s. "
            "Nothing recorded is lost. Open it with: duckdb -readonly %s",
            *(self.public, kept.name, self.public),
        )

    def _is_foreign(self) -> bool:
        """Whether the published file is not what we published: other bytes, or a write-ahead log beside it."""
        if _wal(self.public).exists():
            return True
        known = self._stamp().get("public")
        if known is None or not self.public.exists():
            return False
        identity = _identity(self.public)
        if any(_triple(stamp) == identity for stamp in known):
            return False
        return _sha256(self.public) not in [stamp["sha256"] for stamp in known]

    def _stamp(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._stamp_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _aside(self, path: Path, why: str) -> Path:
        """Keep a copy of a file, and of its write-ahead log, that is about to be replaced."""
        kept = path.with_name(f"{path.stem}.{why}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.duckdb")
        for source, target in ((path, kept), (_wal(path), _wal(kept))):
            if source.exists():
                shutil.copyfile(source, target)
        return kept

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the disk and duckdb raise into errors a user can act on."""
        import duckdb

        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            raise EnvironmentProblem(
                f"the ledger {self.public} cannot be written: {error}",
                hint="set PROSPARSE_HOME to a folder you can write to",
            ) from error
        except duckdb.Error as error:
            if any(os.strerror(code) in str(error) for code in _FULL):
                raise self._full(error) from error
            raise ProSparseError(f"the ledger {self.private} failed: {error}") from error

    def _full(self, error: Exception) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"the disk of {self.home} is full: the ledger could not be written ({error})",
            hint="free some space and run the same command again; what was recorded before is whole",
        )


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _wal(path).unlink(missing_ok=True)


def _identity(path: Path) -> dict[str, int] | None:
    """What changes whenever a file is written or replaced."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _triple(stamp: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stamp.items() if key != "sha256"}


def _copy(source: Path, target: Path) -> str:
    """Copy, flush to disk, and hash on the way."""
    hasher = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK):
            hasher.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return hasher.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
