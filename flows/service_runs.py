"""Which flow runs only claim to be alive, and marking them Crashed so that Prefect accepts a retry."""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from typing import Any

import psutil

from flows.service_address import Address
from flows.service_process import Service

HEARTBEAT_S = 30  # the least Prefect allows
SILENCE_S = 10 * HEARTBEAT_S  # a busy server loses events: one lost heartbeat must not bury a living run


def process_tag() -> str:
    """A tag for flow runs started outside the worker: names this process, so that ``recover`` can tell it is gone."""
    return f"process:{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def crash_dead_runs(address: Address, worker_name: str, worker: Service | None) -> list[str]:
    """Mark the dead runs at ``address`` as Crashed; ``worker`` is ours, if it lives. Returns their names."""
    claims = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    dead = [run for run in address.call("/flow_runs/filter", claims) if is_dead(run, address, worker_name, worker)]
    for run in dead:
        state = {"type": "CRASHED", "name": "Crashed", "message": "Its process is gone"}
        address.call(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return [run["name"] for run in dead]


def is_dead(run: dict[str, Any], address: Address, worker_name: str, worker: Service | None) -> bool:
    """Whether the process of a flow run, described as the API does, is known to be gone; in doubt it is not.

    Asked in turn: the process tag; our worker's label with the pid it reported; and for a run that nothing vouches
    for, on our own server, its heartbeat.
    """
    since = timestamp(run["state"]["timestamp"])
    for tag in run["tags"]:
        if tag.startswith("process:"):
            host, pid, created = tag.removeprefix("process:").rsplit(":", 2)
            return host == socket.gethostname() and not _exists(int(pid), created=float(created))
    if label := run["labels"].get("prefect.worker.name"):
        if label != worker_name:
            return False  # on another machine, or of another home
        if pid := run["infrastructure_pid"]:
            return not _exists(int(pid), flow_run_id=run["id"])
        # A worker took the run and reported no process for it yet. A worker started since then never will.
        return worker is None or psutil.Process(worker.pid).create_time() > since
    if not address.owned:
        return False
    sign = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run['id']}"]}}
    events = address.call("/events/filter", {"limit": 1, "filter": {**sign, "order": "DESC"}})["events"]
    return time.time() - max([since, *(timestamp(event["occurred"]) for event in events)]) > SILENCE_S


def timestamp(text: str) -> float:
    """Seconds since the epoch of a time as the API writes it."""
    return datetime.fromisoformat(text).timestamp()


def _exists(pid: int, *, created: float | None = None, flow_run_id: str | None = None) -> bool:
    """Whether this very process lives: the pid alone may have passed to another."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if created is not None:
            return abs(process.create_time() - created) < 5.0  # the boot time it is counted from may be corrected
        return process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run_id
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
