"""Several nodes: where this one is, and what node 0 and the others tell each other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prosparse_core.distributed import nodes
from prosparse_core.distributed.nodes import Call, Leader, Place, follow, place
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.recipe_runtime import Runtime


@pytest.mark.parametrize(
    ("runtime", "environment", "found"),
    [
        ({"node_rank": 1, "rendezvous": "a:7"}, {"SLURM_NODEID": "0", "MASTER_ADDR": "b"}, (1, "a", 7)),
        ({}, {"NODE_RANK": "2", "MASTER_ADDR": "b", "MASTER_PORT": "9"}, (2, "b", 9)),
        ({}, {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[007-010,12],cpu1"}, (1, "gpu007", nodes.DEFAULT_PORT)),
        ({}, {"JOB_COMPLETION_INDEX": "0", "PET_RDZV_ENDPOINT": "svc:1"}, (0, "svc", 1)),
    ],
)
def test_a_node_is_found_in_the_recipe_or_the_environment(
    runtime: dict[str, object], environment: dict[str, str], found: tuple[int, str, int]
) -> None:
    here = place(Runtime.model_validate({"nodes": 3, **runtime}), environment)
    assert here is not None
    assert (here.rank, here.host, here.port) == found
    assert place(Runtime(), environment) is None, "one node, whatever an allocation says"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MASTER_ADDR": "a"}, "nothing says"),
        ({"NODE_RANK": "3", "MASTER_ADDR": "a"}, "cannot be: 3"),
        ({"NODE_RANK": "1"}, "where node 0 is"),
    ],
)
def test_a_node_that_is_not_found_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        place(Runtime(nodes=3), environment)
    assert "runtime." in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[01-03]", "a01"), ("a[4,7-9]-ib,b", "a4-ib"), ("n-1-[2-3],n-7", "n-1-2")],
)
def test_the_first_of_a_node_list(text: str, first: str) -> None:
    assert nodes.first_of_node_list(text) == first


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> tuple[Place, Place]:
    monkeypatch.setattr(nodes, "POLL_S", 0.02)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Place(0, 2, "127.0.0.1", port), Place(1, 2, "127.0.0.1", port)


class Follower(threading.Thread):
    """Node 1; ``error`` is what ended it."""

    def __init__(self, here: Place, train: Callable[[Call, Callable[[], None]], None], digest: str = "same") -> None:
        super().__init__(daemon=True)
        self._arguments = (here, digest, train)
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            follow(*self._arguments)
        except Exception as error:
            self.error = error


def keep_watching(leader: Leader, limit_s: float = 20) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        leader.watch()
        time.sleep(0.01)


def test_node_0_calls_and_the_other_trains_along(places: tuple[Place, Place]) -> None:
    called: list[Path] = []
    leader = Leader(places[0], "same")
    said: list[str] = []
    follower = Follower(places[1], lambda call, watch: called.append(call.job))
    threading.Timer(0.2, follower.start).start()
    for name in ("one", "two"):
        leader.call(Path(name), said.append)
        leader.watch()
    while len(called) < 2:
        leader.watch()
        time.sleep(0.01)
    leader.end("done")
    follower.join(5)
    assert not follower.is_alive()
    assert follower.error is None
    assert called == [Path("one"), Path("two")]
    assert said == ["waiting for node 1 of 2"]


def test_a_node_that_fails_is_named(places: tuple[Place, Place]) -> None:
    def train(call: Call, watch: Callable[[], None]) -> None:
        raise ProSparseError("rank 1 was killed")

    leader = Leader(places[0], "same")
    follower = Follower(places[1], train)
    follower.start()
    leader.call(Path("job"), lambda text: None)
    with pytest.raises(ProSparseError, match=r"^node 1 \(.*\): rank 1 was killed"):
        keep_watching(leader)
    leader.end("failed")
    follower.join(5)
    assert "rank 1 was killed" in str(follower.error)


def test_a_node_with_another_recipe_is_refused(places: tuple[Place, Place]) -> None:
    leader = Leader(places[0], "same")
    follower = Follower(places[1], lambda call, watch: None, digest="other")
    follower.start()
    with pytest.raises(BadInput, match="node 1 runs another recipe or other code than node 0: other, not same"):
        leader.call(Path("job"), lambda text: None)
    leader.end("failed")
    follower.join(5)
    assert "the run of node 0 failed" in str(follower.error)


def test_a_node_that_falls_silent_is_named(places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SILENCE_S", 0.3)
    over = threading.Event()
    leader = Leader(places[0], "same")
    follower = Follower(places[1], lambda call, watch: over.wait(10) and None)
    follower.start()
    leader.call(Path("job"), lambda text: None)
    with pytest.raises(ProSparseError, match=r"node 1 has not answered for 0.3 s"):
        keep_watching(leader)
    over.set()
    leader.end("failed")
    follower.join(5)


def test_training_along_ends_when_node_0_ends_the_run(places: tuple[Place, Place]) -> None:
    def train(call: Call, watch: Callable[[], None]) -> None:
        while True:
            watch()
            time.sleep(0.01)

    leader = Leader(places[0], "same")
    follower = Follower(places[1], train)
    follower.start()
    leader.call(Path("job"), lambda text: None)
    leader.end("failed")
    follower.join(5)
    assert "the run of node 0 failed" in str(follower.error)


def test_a_node_0_that_is_gone_is_noticed(places: tuple[Place, Place]) -> None:
    leader = Leader(places[0], "same")
    follower = Follower(places[1], lambda call, watch: None)
    follower.start()
    leader._meet(lambda text: None)
    del leader
    follower.join(5)
    assert "does not answer any more" in str(follower.error)
