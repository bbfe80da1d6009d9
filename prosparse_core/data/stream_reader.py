"""Windows of streamed corpora by number: waits for the shard that holds them, and removes what no later step needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core import errors
from prosparse_core.data.stream import FAILURE, ShardState, index_of, shard_name, states
from prosparse_core.errors import ProSparseError

POLL_S = 0.05
Row = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Of one window, or of several: tokens, packed begins of documents, and the label mask where there is one."""


class Streams:
    """The streamed corpora of a mixture, while one process after the other takes its windows in rising order.

    Args:
        mixture: the artifact's folder. What is known of shards is kept beside the artifacts, for later stages and runs.
        work: where shards lie while they are needed.
        prepares: whether this process has them prepared (and removed); the others only read.
        processes: that tokenize then; None: the cores, where a shard is large enough.
    """

    def __init__(self, mixture: Path, work: Path, *, prepares: bool, processes: int | None = None) -> None:
        self._processes = processes
        self._mixture, self._scratch, self._prepares = mixture.resolve(), (work / "stream").resolve(), prepares
        self._index = index_of(self._mixture)
        self._process: subprocess.Popen[bytes] | None = None
        self._first: dict[str, int] = {}
        self._known: dict[str, list[ShardState]] = {}
        self._open: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]] = {}

    def release(self, first: dict[str, int]) -> None:
        """No window before ``first`` of each corpus is needed any more; the first call begins the preparation."""
        if not self._prepares:
            return
        for folder in (self._index, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)
        for name, window in first.items():
            there = list(self._scratch.glob(f"{name}-[0-9]*.tokens.npy"))  # before the states, which are written first
            known = {shard_name(name, s.number): s for s in self._states(name)}
            for path in there:
                state = known.get(path.name.removesuffix(".tokens.npy"))
                if state is None or state.end <= window:
                    path.unlink()
                    for kind in (".begins.", ".mask."):
                        path.with_name(path.name.replace(".tokens.", kind)).unlink(missing_ok=True)
        self._first = first
        if self._process is None:
            self._start(first)

    def _start(self, first: dict[str, int]) -> None:
        (self._scratch / FAILURE).unlink(missing_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        arguments = [str(os.getpid()), str(self._mixture), str(self._index), str(self._scratch)]
        arguments += [json.dumps(first), json.dumps(self._processes)]
        with open(self._scratch / "prepare.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prosparse_core.data.stream", *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def window(self, name: str, number: int, shuffle: Any) -> Row:
        """Tokens, packed begins and label mask of a window; ``shuffle(shard, windows)`` is the order in its shard.

        Raises:
            ProSparseError: what stopped the preparation.
        """
        assert number >= self._first.get(name, 0), "windows are taken in rising order"
        state = self._wait(name, number)
        key = (name, state.number)
        if key not in self._open:
            for old in [k for k in self._open if k[0] == name and k[1] < state.number - 1]:
                del self._open[old]
            path = self._scratch / f"{shard_name(*key)}.tokens.npy"
            begins, mask = (path.with_name(path.name.replace(".tokens.", kind)) for kind in (".begins.", ".mask."))
            self._open[key] = (
                shuffle(state.number, state.windows),
                np.load(path, mmap_mode="r"),  # a shard may be larger than memory, and every rank reads it
                np.load(begins, mmap_mode="r"),
                np.load(mask, mmap_mode="r") if mask.exists() else None,
            )
        order, tokens, begins_, labels = self._open[key]
        place = int(order[number - state.start])
        return tokens[place], begins_[place], None if labels is None else labels[place]

    def _states(self, name: str) -> list[ShardState]:
        self._known[name] = states(self._index, name)
        return self._known[name]

    def _wait(self, name: str, number: int) -> ShardState:
        """The shard that holds a window, once it is there."""
        while True:
            for state in reversed(self._known.get(name, [])):
                if state.start <= number < state.end:
                    if (name, state.number) in self._open or self._is_there(name, state):
                        return state
                    break
            else:
                self._states(name)
                if self._known[name] and number < self._known[name][-1].end:
                    continue
            self._check()
            time.sleep(POLL_S)

    def _is_there(self, name: str, state: ShardState) -> bool:
        return (self._scratch / f"{shard_name(name, state.number)}.tokens.npy").is_file()

    def _check(self) -> None:
        path = self._scratch / FAILURE
        if path.is_file():
            said = json.loads(path.read_text(encoding="utf-8"))
            kind = getattr(errors, said["type"], None)
            if kind is not None:
                raise kind(said["message"], hint=said["hint"])
            raise ProSparseError(f"preparing the stream failed: {said['type']}: {said['message']}")
        if self._process is not None and self._process.poll() is not None:
            raise ProSparseError(
                f"the process that prepares the stream ended with code {self._process.returncode}",
                hint=f"see {self._scratch / 'prepare.log'}; running again goes on from the last checkpoint",
            )

    def close(self) -> None:
        """End the preparation and remove the shards; the next :meth:`release` may begin anywhere, and begins anew."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._first = None, {}
        self._open.clear()
        if self._prepares:
            shutil.rmtree(self._scratch, ignore_errors=True)
