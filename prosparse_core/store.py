"""Artifacts on disk: immutable folders named by fingerprint, written beside, hashed, then renamed into place.

Layout under ``$PROSPARSE_HOME/store``::

    <step>/<fingerprint[:20]>/          a finished artifact: its files, facts.jsonl and artifact.json; dropped.json
                                        where a retention rule took files away
    .work/<step>-<fingerprint[:20]>/    work in progress; kept after a crash so that a step can go on
    .locks/<fingerprint[:20]>           flock: dies with the process that holds it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prosparse_core.errors import EnvironmentProblem, ProSparseError

RECORD = "artifact.json"
DROPPED = "dropped.json"
"""Beside the record, where a retention rule took files away: file -> when and why. The record itself never changes."""
FACTS = "facts.jsonl"
VOLATILE_FILES = ("log.jsonl", "held_out.jsonl", "events.jsonl", "checkpoints.jsonl")
"""Files that hold wall-clock figures, or what ``runtime`` asked for: kept and hashed, but not part of an artifact's
digest."""
CHUNK = 1 << 20


def canonical_json(value: Any) -> str:
    """The one way a value is written before it is hashed; refuses what it cannot write exactly."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(payload: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of everything that decides a result."""
    return sha256_text(canonical_json(payload))


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, or (``folder`` None, while planning) one that is not there yet."""

    step: str
    label: str
    fingerprint: str | None
    digest: str | None
    folder: Path | None

    @property
    def path(self) -> Path:
        assert self.folder is not None, f"{self.label} is only planned, not built"
        return self.folder

    def meta(self) -> dict[str, Any]:
        """What the step recorded about its result."""
        return read_record(self.path)["meta"]


class Store:
    """The artifacts under one home folder."""

    def __init__(self, home: Path) -> None:
        self.root = home / "store"

    def folder(self, step: str, print_: str) -> Path:
        return self.root / step / print_[:20]

    def work_folder(self, step: str, print_: str) -> Path:
        return self.root / ".work" / f"{step}-{print_[:20]}"

    def find(self, step: str, label: str, print_: str) -> Artifact | None:
        """The artifact of a fingerprint, if it is in the store and its record is whole."""
        folder = self.folder(step, print_)
        if not (folder / RECORD).is_file():
            return None
        record = read_record(folder)
        if record["fingerprint"] != print_:
            raise ProSparseError(f"{folder}: holds fingerprint {record['fingerprint']}, not {print_}", hint="delete it")
        gone = dropped(folder)
        damaged = next((f for f in record["files"] if f["path"] not in gone and not same_size(folder, f)), None)
        if damaged:
            raise ProSparseError(
                f"artifact {folder} is damaged: {damaged['path']} is missing or not {damaged['bytes']} bytes",
                hint=f"delete the folder {folder}; the next run makes it again",
            )
        return Artifact(step, label, print_, record["digest"], folder)

    @contextlib.contextmanager
    def lock(self, print_: str, on_wait: Callable[[], None] | None = None, poll_s: float = 0.5) -> Iterator[None]:
        """Hold a fingerprint for this process; a second process waits until the first is done or dead."""
        path = self.root / ".locks" / print_[:20]
        make_folder(path.parent)
        with open(path, "w") as handle:
            waited = False
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waited and on_wait:
                        on_wait()
                    waited = True
                    time.sleep(poll_s)
            yield

    def commit(
        self,
        work: Path,
        *,
        step: str,
        label: str,
        payload: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        provenance: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Artifact:
        """Hash a work folder, write its record, and rename it into place; atomic."""
        print_ = fingerprint(payload)
        files = [_describe(work, path) for path in _files(work)]
        digest = sha256_text(canonical_json([[f["path"], f["sha256"]] for f in files if not f["volatile"]]))
        record = {
            "schema": 1,
            "step": step,
            "label": label,
            "fingerprint": print_,
            "payload": payload,
            "digest": digest,
            "files": files,
            "inputs": {
                r: {"digest": a.digest, "fingerprint": a.fingerprint, "step": a.step} for r, a in inputs.items()
            },
            "provenance": provenance,
            "meta": meta,
        }
        write_json(work / RECORD, record)
        fsync_tree(work)
        final = self.folder(step, print_)
        make_folder(final.parent)
        if final.exists():
            shutil.rmtree(final)
        os.replace(work, final)
        _fsync_folder(final.parent)
        return Artifact(step, label, print_, digest, final)

    def drop(self, artifact: Artifact, part: str, reason: str) -> int:
        """Take a file, or all files of a folder, away from an artifact for good; returns the bytes that became free.

        The artifact keeps its record and digest, and says from now on what it no longer holds; a process that dies in
        the middle leaves it saying so of files that are still there, which the next call takes away.
        """
        assert artifact.fingerprint is not None
        with self.lock(artifact.fingerprint):
            folder, gone = artifact.path, dropped(artifact.path)
            files = [f for f in read_record(folder)["files"] if f["path"] == part or f["path"].startswith(f"{part}/")]
            here = [f for f in files if (folder / f["path"]).is_file()]
            if new := [f for f in files if f["path"] not in gone]:
                entry = {"dropped_at": datetime.now(UTC).isoformat(timespec="microseconds"), "reason": reason}
                write_json(folder / DROPPED, gone | {f["path"]: {"bytes": f["bytes"], **entry} for f in new})
            for file in here:
                (folder / file["path"]).unlink()
        return sum(f["bytes"] for f in here)

    def remove(self, step: str, print_: str) -> None:
        """Forget an artifact and any work in progress (``--force``)."""
        for folder in (self.folder(step, print_), self.work_folder(step, print_)):
            if folder.exists():
                shutil.rmtree(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an artifact folder.

    Raises:
        ProSparseError: the record is not readable.
    """
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProSparseError(
            f"artifact record {folder / RECORD} is not readable: {error}",
            hint=f"delete the folder {folder}; the next run makes it again",
        ) from error


def dropped(folder: Path) -> dict[str, dict[str, Any]]:
    """What a retention rule took away from an artifact: file -> ``bytes``, ``dropped_at``, ``reason``."""
    try:
        return json.loads((folder / DROPPED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ProSparseError(
            f"{folder / DROPPED} is not readable: {error}",
            hint=f"delete the folder {folder}; the next run makes it again",
        ) from error


def verify(folder: Path) -> list[str]:
    """The files of an artifact whose content no longer has the recorded hash; what was dropped is not missed."""
    gone = dropped(folder)
    return [
        f["path"]
        for f in read_record(folder)["files"]
        if f["path"] not in gone
        if not (folder / f["path"]).is_file() or _sha256(folder / f["path"]) != f["sha256"]
    ]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def make_folder(path: Path) -> Path:
    """Make a folder, or say why it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot make the folder {path}: {error.strerror}", hint="set PROSPARSE_HOME to a folder you can write to"
        ) from error
    return path


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse before the expensive part when the disk cannot hold the result.

    Raises:
        EnvironmentProblem: less than ``needed_bytes`` are free on the disk of ``folder``.
    """
    there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise EnvironmentProblem(
            f"{what} needs {needed_bytes / 2**30:.1f} GiB, but the disk of {folder} has {free / 2**30:.1f} GiB free",
            hint="free some space, or set PROSPARSE_HOME to a folder on a larger disk",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)


def _describe(root: Path, path: Path) -> dict[str, Any]:
    return {
        "path": path.relative_to(root).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "volatile": path.name in VOLATILE_FILES,
    }


def same_size(folder: Path, described: Mapping[str, Any]) -> bool:
    try:
        return (folder / described["path"]).stat().st_size == described["bytes"]
    except OSError:
        return False


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def fsync_tree(folder: Path) -> None:
    """All files under a folder are on the disk."""
    for path in _files(folder):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
