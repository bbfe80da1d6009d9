"""Training processes beside the flow: start them by ``torch.distributed.run``, relay what they tell, end them for sure.

Three generations: the flow starts the launcher (:mod:`prosparse_core.distributed.launcher`), which starts the trainers.
A trainer that dies ends the others and fails the stage, not the flow; a flow that dies, however, ends them all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from prosparse_core import errors
from prosparse_core.distributed.nodes import Call, Leader, Place
from prosparse_core.distributed.trainer import PROGRESS
from prosparse_core.errors import EnvironmentProblem, ProSparseError
from prosparse_core.progress import Progress
from prosparse_core.recipe_runtime import Runtime
from prosparse_core.stage_job import StageJob, num_threads

JOB = "job.json"
POLL_S = 0.2
GRACE_S = 20
"""Seconds between asking the trainers to end and ending them."""
VISIBLE_S = 60
"""How long a file may take from one node to another over a shared file system."""
TAIL = 12
"""Lines of a failed trainer's output that its error shows."""


def launch(job: StageJob, progress: Progress, leader: Leader | None = None) -> None:
    """Train a stage in processes of its own, and wait for them in the calling thread.

    Args:
        leader: of the nodes that train together, when there are several.

    Raises:
        ProSparseError: a trainer failed, with its own error where it has one, else with the end of its output.
            Checkpoints are kept.
    """
    folder = job.folder / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.write(folder / JOB)
    meeting = [] if leader is None else _meeting(leader.place, leader.call(folder / JOB, progress.note))
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(_relay(folder / PROGRESS, progress))
        process = stack.enter_context(_started(folder, job.runtime, meeting))
        while process.poll() is None:
            time.sleep(POLL_S)
            tell()
            if leader is not None:
                leader.watch()
    if process.returncode and leader is not None:
        leader.reported()  # that another node broke off is why trainers here fail
    if process.returncode:
        _fail(job.label, folder, 0, process.returncode)
    shutil.rmtree(folder)


def join(place: Place, call: Call, watch: Callable[[], None]) -> None:
    """Take part, as another node than the first, in a stage that node 0 launches; see :func:`nodes.follow`.

    Raises:
        ProSparseError: as :func:`launch`; and what ``watch``, called now and then, raises.
    """
    until = time.monotonic() + VISIBLE_S
    while not call.job.is_file():
        watch()
        if time.monotonic() > until:
            raise EnvironmentProblem(
                f"{call.job}, which node 0 has written, is not here", hint="every node needs the same $PROSPARSE_HOME"
            )
        time.sleep(POLL_S)
    job = StageJob.read(call.job)
    with _started(call.job.parent, job.runtime, _meeting(place, call), place.rank) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            watch()
    if process.returncode:
        _fail(job.label, call.job.parent, place.rank, process.returncode)


def _meeting(place: Place, call: Call) -> list[str]:
    """torch's arguments for several nodes."""
    return [
        "--rdzv-backend=static",
        f"--nnodes={place.count}",
        f"--node-rank={place.rank}",
        f"--master-addr={place.host}",
        f"--master-port={call.port}",
    ]


@contextlib.contextmanager
def _started(folder: Path, runtime: Runtime, meeting: list[str], node: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher; ended, with all trainers, when the block is left."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(num_threads(runtime) or 1),
    }
    torchs = [
        *(meeting or ["--standalone"]),
        "--max-restarts=0",
        "--monitor-interval=0.1",
        f"--shutdown-timeout={GRACE_S // 2}",
    ]
    torchs += [
        f"--nproc-per-node={runtime.processes or 1}",
        "-m",
        "prosparse_core.distributed.trainer",
        str(folder / JOB),
    ]
    failures, log_path = folder / f"failures-{node}.json", folder / f"launcher-{node}.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prosparse_core.distributed.launcher", str(os.getpid()), str(failures), *torchs],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the flow, which ends the trainers in order
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel ends the trainers with it
            process.wait()


@contextlib.contextmanager
def _relay(path: Path, progress: Progress) -> Iterator[Callable[[], None]]:
    """A function that passes on what rank 0 has told since the last call; once more at the end."""
    path.touch()
    with open(path, encoding="utf-8") as file:
        rest = ""

        def tell() -> None:
            nonlocal rest
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                said = json.loads(line)
                if "note" in said:
                    progress.note(said["note"])
                else:
                    progress.update(said["done"], said["total"], **said["fields"])

        try:
            yield tell
        finally:
            tell()


def _fail(label: str, folder: Path, node: int, code: int) -> NoReturn:
    """Raise the error that began it: a trainer's own, or how the first of them was killed."""
    told = {int(p.stem.partition("-")[2]): json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("failure-*")}
    failures = folder / f"failures-{node}.json"
    ended = json.loads(failures.read_text(encoding="utf-8")) if failures.is_file() else []
    by_time = sorted(told.items(), key=lambda item: item[1]["at"])
    hint = "run the same command again: it goes on from its last checkpoint"
    killed = next((e for e in ended if e["signal"] not in (None, "SIGTERM") and e["rank"] not in told), None)
    if killed is not None:  # what the others then say is only that they miss it
        rank, what = killed["rank"], f"was killed by {killed['signal']}"
        if killed["signal"] == "SIGKILL":
            hint += "; the kernel kills what exceeds the machine's memory (see train.micro_batch)"
    elif by_time:
        for _, said in by_time:
            if (kind := getattr(errors, said["type"], None)) is not None:
                raise kind(said["message"], hint=said["hint"])
            if said["errno"] == errno.ENOSPC:
                raise OSError(said["errno"], said["message"])
        rank, what = by_time[0][0], f"failed: {by_time[0][1]['type']}: {by_time[0][1]['message']}"
    else:
        rank, what = None, f"ended with code {code}"
    name = "the launcher" if rank is None else f"rank {rank}"
    tail = _tail(folder / (f"launcher-{node}.log" if rank is None else f"rank-{rank}.log"))
    raise ProSparseError(f"{label}: {name} {what}{tail}", hint=hint)


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return f"; the end of {path}:\n" + "\n".join(f"  | {line}" for line in lines[-TAIL:]) if lines else ""
