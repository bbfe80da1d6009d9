"""Runs code a model wrote: in a subprocess of its own, with limits, cut off from network and disk where permitted.

What holds everywhere: limits on CPU time, wall time, memory, file size, open files and processes; an empty environment;
an empty temporary folder; every process it started is killed, also one that left its group; no core dumps; it dies with
us. What holds where the kernel lets a user have namespaces: no network, and all files but the temporary folder's are
read-only. This keeps accidents in; it is no wall against an attacker, which is why nothing runs without the opt-in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from prosparse_core.errors import EnvironmentProblem

GUARD = Path(__file__).resolve().parent / "benchmark_guard.py"
GRACE_S = 10.0
"""Beyond the wall time of a program: how long its guard has to start and to clear up."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its end without an exception; leaving early by any exit code is no pass."""
    reason: str
    """passed, or the exception, exit, signal or limit that ended it."""
    isolation: str
    """no network, files read-only; no network; or limits only."""


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program that is not trusted.

    Raises:
        EnvironmentProblem: no subprocess can be started here, or its guard fails.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="prosparse-code-", ignore_cleanup_errors=True) as folder:
        request = json.dumps({**asdict(limits), "folder": folder, "program": program})
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(GUARD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentProblem(f"cannot start a process to run code in: {error}") from error
        try:
            out, err = process.communicate(request.encode(), timeout=limits.wall_s + GRACE_S)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out", "unknown")
        finally:
            _kill_group(process)
    try:
        found = json.loads(out)
        return Outcome(bool(found["passed"]), str(found["reason"]), str(found["isolation"]))
    except (ValueError, KeyError, TypeError):
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise EnvironmentProblem(f"the guard around untrusted code failed: {last[0]}") from None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@lru_cache(maxsize=1)
def isolation() -> str:
    """What this machine permits, tried once."""
    return run_program("pass").isolation
