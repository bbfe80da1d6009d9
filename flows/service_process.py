"""Background processes known by a record under ``$PROSPARSE_HOME/prefect``, their logs, and the lock around them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from prosparse_core.errors import EnvironmentProblem

POOL = "prosparse"
"""The work pool of this machine."""
NUM_LOG_LINES = 15  # of a dead service's log, quoted in the error

# Handles of what this very process started: only a parent can reap a child, and a dropped handle would warn.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Deployment:
    """A deployment of a flow. ``entrypoint`` is a module path: with a file path Prefect would put ``flows/`` itself
    on sys.path, where ``flows/evaluate.py`` hides the package of that name which lm-eval imports."""

    name: str
    entrypoint: str
    pool: str = POOL
    job_variables: dict[str, Any] | None = None
    pull: list[dict[str, Any]] | None = None
    """What Prefect does before the flow; None: work in the run folder."""


@dataclass(frozen=True)
class Service:
    """A live process of ours. The recorded command tells it from a stranger that got a dead one's pid."""

    name: str
    pid: int
    command: list[str]
    url: str  # the API it serves or polls
    log_offset: int  # bytes in the log before it started

    def is_alive(self) -> bool:
        if child := _children.get(self.pid):
            return child.poll() is None  # no need to ask who it is, and just after its start it could not tell
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[1:] == self.command[1:]
        except psutil.Error:
            return False

    def await_(self, home: Path, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until it is ready. EnvironmentProblem, with the end of its log, if it dies or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            alive = self.is_alive()
            if alive and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            log = log_file(home, self.name)
            what = f"is not ready after {timeout_s:.0f} s" if alive else "died while starting"
            if not alive:
                _record(home, self.name).unlink(missing_ok=True)
            with log.open("rb") as stream:
                stream.seek(self.log_offset)
                lines = stream.read().decode(errors="replace").strip().splitlines()[-NUM_LOG_LINES:]
            quoted = "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
            raise EnvironmentProblem(
                f"the Prefect {self.name} {what}; the end of {log}:\n{quoted}",
                hint="`prosparse doctor` checks the versions that are known to work together",
            )


def log_file(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def find_service(home: Path, name: str) -> Service | None:
    """The live service of that name; None when it is not running, whatever its pid file says."""
    try:
        service = Service(**json.loads(_record(home, name).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # no file, or a torn or foreign one
    return service if service.is_alive() else None


def start_service(
    home: Path, name: str, arguments: list[str], url: str, folder: Path, env: Mapping[str, str]
) -> Service:
    """Start ``prefect ARGUMENTS`` in its own session, with no terminal, in ``folder``, writing to its log."""
    log, record = log_file(home, name), _record(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", *arguments]
    with log.open("ab") as stream:
        offset = stream.tell()
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    _children[child.pid] = child
    service = Service(name, child.pid, command, url, offset)
    scratch = record.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(service)))
    scratch.replace(record)
    return service


def stop_service(home: Path, name: str, timeout_s: float) -> bool:
    """Stop the service politely, then by force with all it started; drop its pid file. False if it was not running."""
    service = find_service(home, name)
    if service:
        process = psutil.Process(service.pid)
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, rest = psutil.wait_procs(family, timeout=timeout_s)
        for straggler in rest:
            straggler.kill()
        psutil.wait_procs(rest, timeout=timeout_s)
        if child := _children.pop(service.pid, None):
            child.wait()
    _record(home, name).unlink(missing_ok=True)
    return service is not None


def stop_orphans(home: Path) -> int:
    """Stop the temporary servers that runs without a server left behind when they were killed; how many.

    Prefect marks them in their environment. One whose parent is still a Python process is in use.
    """
    num_stopped = 0
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get("PREFECT__SERVER_EPHEMERAL") != "1" or env.get("PREFECT_HOME") != str(home / "prefect"):
                continue
            if not _is_python(process.parent()):
                process.terminate()
                num_stopped += 1
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return num_stopped


def _is_python(process: psutil.Process | None) -> bool:
    try:
        return process is not None and "python" in Path(process.exe()).name.lower()
    except psutil.Error:
        return False  # not even ours to look at


@contextmanager
def turn(home: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on the services of ``home``; ``on_wait`` is called if another process has it. Dies with us."""
    path = home / "prefect" / "service.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _record(home: Path, name: str) -> Path:
    return home / "prefect" / f"prosparse-{name}.json"
