"""Which flow runs are dead: in doubt none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from unittest.mock import create_autospec

import psutil
import pytest

from flows.service_address import Address
from flows.service_process import Service
from flows.service_runs import SILENCE_S, crash_dead_runs, is_dead, process_tag

RUN_ID = "0f4fdd44-0000-4000-8000-000000000001"
HOST = socket.gethostname()


def iso(age_s: float) -> str:
    return datetime.fromtimestamp(time.time() - age_s, UTC).isoformat().replace("+00:00", "Z")


def flow_run(
    *, age_s: float = 5.0, tags: list[str] | None = None, worker: str | None = None, pid: int | None = None
) -> Any:
    return {
        "id": RUN_ID,
        "name": "solid-gorilla",
        "state": {"timestamp": iso(age_s)},
        "tags": tags or [],
        "labels": {"prefect.flow.id": "x"} | ({"prefect.worker.name": worker} if worker else {}),
        "infrastructure_pid": None if pid is None else str(pid),
    }  # fmt: skip


def address(heartbeat_age_s: float | None = None, *, owned: bool = True) -> Any:
    heartbeats = [] if heartbeat_age_s is None else [{"occurred": iso(heartbeat_age_s)}]
    stand_in = create_autospec(Address, instance=True, owned=owned)
    stand_in.call.return_value = {"events": heartbeats}
    return stand_in


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def flow_process() -> Iterator[int]:
    """A process that runs RUN_ID, as far as its environment tells."""
    env = os.environ | {"PREFECT__FLOW_RUN_ID": RUN_ID}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=env) as child:
        yield child.pid
        child.kill()


def test_tagged_process(dead_pid: int) -> None:
    created = f"{psutil.Process().create_time():.0f}"
    assert process_tag() == f"process:{HOST}:{os.getpid()}:{created}"
    for tag, dead in {
        process_tag(): False,
        f"process:{HOST}:{dead_pid}:{created}": True,
        f"process:{HOST}:{os.getpid()}:{int(created) - 3600}": True,  # the pid has passed to another process
        f"process:elsewhere:{dead_pid}:{created}": False,
        f"process:host:with:colons:{dead_pid}:{created}": False,
    }.items():
        assert is_dead(flow_run(age_s=9 * SILENCE_S, tags=["gpu", tag]), address(), "w", None) is dead, tag


def test_run_of_our_worker(dead_pid: int, flow_process: int) -> None:
    assert is_dead(flow_run(worker="w", pid=dead_pid), address(), "w", None)
    assert is_dead(flow_run(worker="w", pid=os.getpid()), address(), "w", None)  # a process, but not of this run
    assert not is_dead(flow_run(age_s=9 * SILENCE_S, worker="w", pid=flow_process), address(), "w", None)
    assert not is_dead(flow_run(worker="another", pid=dead_pid), address(), "w", None)


def test_zombie_is_dead(flow_process: int) -> None:
    process = psutil.Process(flow_process)
    process.kill()
    deadline = time.monotonic() + 5.0
    while process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert is_dead(flow_run(worker="w", pid=flow_process), address(), "w", None)


def test_run_that_a_worker_took_without_starting_a_process() -> None:
    worker = Service("worker", os.getpid(), [], "", 0)
    worker_age_s = time.time() - psutil.Process().create_time()
    assert is_dead(flow_run(worker="w"), address(), "w", None)
    assert not is_dead(flow_run(worker="w", age_s=0.0), address(), "w", worker)  # it may be about to
    assert is_dead(flow_run(worker="w", age_s=worker_age_s + 60.0), address(), "w", worker)  # its predecessor took it


def test_run_that_nothing_vouches_for_lives_by_its_heartbeat() -> None:
    old = flow_run(age_s=9 * SILENCE_S)
    assert is_dead(old, address(None), "w", None)
    assert is_dead(old, address(SILENCE_S + 5.0), "w", None)
    assert not is_dead(old, address(SILENCE_S - 5.0), "w", None)
    assert not is_dead(flow_run(age_s=SILENCE_S - 5.0), address(None), "w", None)
    assert not is_dead(old, address(None, owned=False), "w", None)  # on a shared server it may be anybody's


def test_only_dead_ones_are_marked(dead_pid: int) -> None:
    living = flow_run(tags=[process_tag()]) | {"id": "living", "name": "living"}
    dead = flow_run(tags=[f"process:{HOST}:{dead_pid}:0"])
    api = address()
    api.call.side_effect = lambda path, payload: [living, dead] if path == "/flow_runs/filter" else {"status": "ACCEPT"}
    assert crash_dead_runs(api, "w", None) == ["solid-gorilla"]
    (_, claims), (path, marked) = (call.args for call in api.call.call_args_list)
    assert claims["flow_runs"]["state"]["type"]["any_"] == ["RUNNING", "PENDING", "CANCELLING"]
    assert path == f"/flow_runs/{RUN_ID}/set_state"
    assert marked["force"] is True
    assert marked["state"]["type"] == "CRASHED"
