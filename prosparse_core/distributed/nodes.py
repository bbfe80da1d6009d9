"""Several machines as one: node 0 runs the recipe and calls the others to each stage; they train along and wait again.

Every node runs the same command on the same ``$PROSPARSE_HOME``. They talk through a store of torch.distributed, which
node 0's process serves at the rendezvous; a node that fails or falls silent fails the stage, with its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput, EnvironmentProblem, ProSparseError
from prosparse_core.recipe_runtime import Runtime

RANK_VARIABLES = ("NODE_RANK", "GROUP_RANK", "PET_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
DEFAULT_PORT = 29400
POLL_S = 0.5
MEETING_S = 600
"""How long nodes wait for each other in the beginning."""
SILENCE_S = 60
"""After which a node counts as dead."""
FAREWELL_S = 10
"""How long node 0 waits at its end for the others to have heard of it."""


@dataclass(frozen=True)
class Place:
    """Which node this is, and where node 0 serves the store."""

    rank: int
    count: int
    host: str
    port: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def place(runtime: Runtime, environment: Mapping[str, str] = os.environ) -> Place | None:
    """This node's place; None when one node trains.

    Raises:
        BadInput: neither the recipe nor the environment says which node this is, or where node 0 is.
    """
    if runtime.nodes == 1:
        return None
    ranks = [environment[name] for name in RANK_VARIABLES if environment.get(name, "").isdigit()]
    rank = runtime.node_rank if runtime.node_rank is not None else int(ranks[0]) if ranks else None
    if rank is None or rank >= runtime.nodes:
        raise BadInput(
            f"runtime.nodes={runtime.nodes}, but which of them this is "
            + ("nothing says" if rank is None else f"cannot be: {rank}"),
            hint=f"set runtime.node_rank (0 to {runtime.nodes - 1}), or one of {', '.join(RANK_VARIABLES)}",
        )
    host, port = _rendezvous(runtime, environment)
    return Place(rank, runtime.nodes, host, port)


def _rendezvous(runtime: Runtime, environment: Mapping[str, str]) -> tuple[str, int]:
    found = runtime.rendezvous or environment.get("PET_RDZV_ENDPOINT") or ""
    if not found and environment.get("MASTER_ADDR"):
        found = f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', DEFAULT_PORT)}"
    if not found and (nodes := environment.get("SLURM_JOB_NODELIST")):
        found = first_of_node_list(nodes)
    host, _, port = found.partition(":")
    if not host:
        raise BadInput(
            f"runtime.nodes={runtime.nodes}, but nothing says where node 0 is",
            hint="set runtime.rendezvous=HOST:PORT, or MASTER_ADDR and MASTER_PORT (Slurm's node list is known too)",
        )
    return host, int(port or DEFAULT_PORT)


def first_of_node_list(text: str) -> str:
    """``gpu[007-010,12],cpu1`` -> ``gpu007``: Slurm's own order, in which node 0 is the first."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", text)
    assert match, text
    return "".join(part or "" for part in match.groups())


@dataclass(frozen=True)
class Call:
    """What node 0 asks the others to train: the file of a job, and where its trainers meet."""

    job: Path
    port: int


def _connect(place: Place) -> Any:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=MEETING_S)
    try:
        return TCPStore(place.host, place.port, None, place.is_first, timeout, wait_for_workers=False)
    except RuntimeError as error:
        what = "serve" if place.is_first else "reach node 0"
        raise EnvironmentProblem(
            f"node {place.rank} cannot {what} at {place.host}:{place.port}: {str(error).splitlines()[0]}",
            hint="is the port free and open, and does node 0 run?",
        ) from error


class Leader:
    """Node 0's side, for a whole run.

    Args:
        digest: of the recipe and the code; the others must have the same.
    """

    def __init__(self, place: Place, digest: str) -> None:
        assert place.is_first
        self.place, self._digest = place, digest
        self._store = _connect(place)
        self._calls = 0
        self._beats: dict[int, tuple[int, float]] = {}

    @property
    def _others(self) -> range:
        return range(1, self.place.count)

    def call(self, job: Path, say: Callable[[str], None]) -> Call:
        """Call every node to a job, once all are there.

        Raises:
            EnvironmentProblem: a node did not come.
            BadInput: a node has another recipe or other code.
        """
        self._meet(say)
        with contextlib.closing(socket.socket()) as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self._calls += 1
        self._store.set(f"job/{self._calls}", json.dumps({"job": str(job), "port": port}))
        return Call(job, port)

    def _meet(self, say: Callable[[str], None]) -> None:
        began, said = time.monotonic(), False
        while missing := [n for n in self._others if not self._store.check([f"hello/{n}"])]:
            if not said:
                say(f"waiting for node {', '.join(map(str, missing))} of {self.place.count}")
                said = True
            if time.monotonic() - began > MEETING_S:
                raise EnvironmentProblem(
                    f"node {', '.join(map(str, missing))} did not come to {self.place.host}:{self.place.port}",
                    hint="run the same command on every node",
                )
            time.sleep(POLL_S)
        for node in self._others:
            theirs = self._store.get(f"hello/{node}").decode()
            if theirs != self._digest:
                raise BadInput(
                    f"node {node} runs another recipe or other code than node 0: {theirs[:9]}, not {self._digest[:9]}",
                    hint="run the same command, of the same version, on every node",
                )

    def watch(self) -> None:
        """Raise when another node failed in the current job or is silent.

        Raises:
            ProSparseError: names the node.
        """
        for node in self._others:
            if self._store.check([f"failed/{self._calls}/{node}"]):
                raise ProSparseError(self._store.get(f"failed/{self._calls}/{node}").decode())
            beats, since = self._store.add(f"beat/{node}", 0), time.monotonic()
            before = self._beats.get(node)
            if before is None or before[0] != beats:
                self._beats[node] = (beats, since)
            elif since - before[1] > SILENCE_S:
                raise ProSparseError(
                    f"node {node} has not answered for {SILENCE_S} s",
                    hint="once it is up again, run the same command on every node: it goes on from its last checkpoint",
                )

    def reported(self) -> None:
        """Give the others a moment to say that it was they who failed; see :meth:`watch`."""
        until = time.monotonic() + 4 * POLL_S
        while time.monotonic() < until:
            self.watch()
            time.sleep(POLL_S / 2)

    def end(self, status: str) -> None:
        """Tell the others that the run is over, and wait until they heard it."""
        self._store.set("end", status)
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < until and not all(self._store.check([f"bye/{n}"]) for n in self._others):
            time.sleep(POLL_S / 5)


def follow(place: Place, digest: str, train: Callable[[Call, Callable[[], None]], None]) -> None:
    """Train along in every job node 0 calls to, until its run is over.

    Args:
        train: takes part in a job; it calls the function it gets now and then, and ends when that raises.

    Raises:
        ProSparseError: node 0's run failed, or does not answer any more; or this node failed.
    """
    assert not place.is_first
    store = _connect(place)
    try:
        store.set(f"hello/{place.rank}", digest)
        number = 1
        while True:
            _beat(store, place)
            if store.check([f"job/{number}"]):
                found = json.loads(store.get(f"job/{number}"))
                _train(store, place, number, Call(Path(found["job"]), found["port"]), train)
                number += 1
            elif store.check(["end"]):
                status = store.get("end").decode()
                store.set(f"bye/{place.rank}", "")
                if status != "done":
                    raise ProSparseError(f"the run of node 0 {status}", hint="see what node 0 says")
                return
            else:
                time.sleep(POLL_S)
    except RuntimeError as error:  # what the store raises when its server is gone
        raise ProSparseError(
            f"node 0 at {place.host}:{place.port} does not answer any more: {str(error).splitlines()[0]}",
            hint="run the same command on every node again: it goes on from its last checkpoint",
        ) from error


def _beat(store: Any, place: Place) -> None:
    store.add(f"beat/{place.rank}", 1)


def _train(
    store: Any, place: Place, number: int, call: Call, train: Callable[[Call, Callable[[], None]], None]
) -> None:
    def watch() -> None:
        _beat(store, place)
        if store.check(["end"]):
            raise ProSparseError("node 0 has ended the run")

    try:
        train(call, watch)
    except ProSparseError as error:
        store.set(f"failed/{number}/{place.rank}", f"node {place.rank} ({socket.gethostname()}): {error}")
        if not store.check(["end"]):
            store.set(f"bye/{place.rank}", "")
            raise
