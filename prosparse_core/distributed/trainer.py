"""One of the processes that train a stage, as a program under ``torch.distributed.run``, whose argument is the job.

Beside the job's file it leaves what the process that waits for it needs: ``rank-K.log`` (all it printed),
``failure-K.json`` (why it ended, if it failed) and, from rank 0, ``progress.jsonl``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from prosparse_core.distributed.lifeline import end_with_parent
from prosparse_core.memory import keep_freed_memory
from prosparse_core.store import write_json

PROGRESS = "progress.jsonl"
PARENT = "PROSPARSE_LAUNCHER"
"""Environment variable with the number of the process that starts the trainers."""


class Told:
    """Progress for another process to read: one JSON line for each call. Only rank 0 tells."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - as long as the process

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        self._file.write(json.dumps({"done": done, "total": total, "fields": fields}) + "\n")

    def note(self, text: str) -> None:
        self._file.write(json.dumps({"note": text}) + "\n")


def failure(error: BaseException) -> dict[str, Any]:
    """An error as another process can raise it again."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "hint": getattr(error, "hint", None),
        "errno": getattr(error, "errno", None),
        "traceback": traceback.format_exc(),
        "at": time.time(),
    }


def main(path: Path) -> int:
    """Train the job's stage together with the other ranks."""
    end_with_parent(int(os.environ[PARENT]))
    keep_freed_memory()
    rank = int(os.environ["RANK"])
    log = os.open(path.with_name(f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        from prosparse_core.distributed.ranks import joined
        from prosparse_core.progress import Silent
        from prosparse_core.stage_job import StageJob, run_stage

        job = StageJob.read(path)
        with joined(job.runtime.world_size, job.device) as ranks:
            run_stage(job, Told(path.with_name(PROGRESS)) if ranks.is_first else Silent(), ranks)
    except BaseException as error:
        traceback.print_exc()
        write_json(path.with_name(f"failure-{rank}.json"), failure(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after an error, threads of a broken process group may keep an ordinary exit waiting
