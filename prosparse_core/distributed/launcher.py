"""Between flow and trainers: ``torch.distributed.run`` as a program that ends with the flow and tells who failed.

``python -m prosparse_core.distributed.launcher PARENT FAILURES ARGUMENTS...``: the number of the flow's process, where
to write who failed, and torch's own arguments.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from prosparse_core.distributed.lifeline import end_with_parent
from prosparse_core.distributed.trainer import PARENT
from prosparse_core.store import write_json


def main(parent: int, failures: Path, arguments: list[str]) -> int:
    """Run the trainers to their end; 1 if one failed, which ``failures`` then lists in the order of time."""
    end_with_parent(parent)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[PARENT] = str(os.getpid())
    try:
        run.main(arguments)
    except ChildFailedError as error:
        found = [
            {"rank": rank, "signal": _signal(failure.exitcode), "at": failure.timestamp}
            for rank, failure in error.failures.items()
        ]
        write_json(failures, sorted(found, key=lambda f: f["at"]))
        return 1
    return 0


def _signal(exit_code: int) -> str | None:
    return signal.Signals(-exit_code).name if exit_code < 0 else None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
