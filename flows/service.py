"""Prefect around the pipeline: server, process pool, deployments and worker, brought up and down by one command.

How a plain ``prefect deployment run prosparse/full --watch`` finds the server: ``up`` writes ``prefect.toml`` (the
API's address, nothing else) into the folder the pipeline runs from, and ``down`` removes it. Prefect reads that file
from the working directory only; environment variables and ``.env`` win over it, profiles lose to it. So nothing under
``~/.prefect`` is touched, any free port will do, and without a server there is no file, which leaves ``prosparse run``
to Prefect's own temporary server. A committed file would break that, and an empty ``PREFECT_API_URL`` cannot hide it:
Prefect 3.8 then drops every event, task runs included.

A server of the user's own is used as it is (``flows.service_address`` tells whose it is). What ``up`` starts has its
own session, works in the run folder, logs under ``$PROSPARSE_HOME/logs`` and keeps its state, database included, under
``$PROSPARSE_HOME/prefect``. ``import prefect`` costs seconds: only ``up`` does it, the rest speaks plain HTTP.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.service_address import (
    Address,
    any_free_port,
    find_address,
    is_free,
    remove_stale_pointer,
    write_pointer,
)
from flows.service_cluster import cluster_deployments, require_pool, waiting
from flows.service_process import (
    POOL,
    Deployment,
    Service,
    find_service,
    log_file,
    start_service,
    stop_orphans,
    stop_service,
    turn,
)
from flows.service_runs import HEARTBEAT_S, SILENCE_S, crash_dead_runs, process_tag, timestamp
from prosparse_core.errors import EnvironmentProblem

WORKER_LIMIT = 1  # flow runs at a time: two trainings on one machine queue instead of thrashing
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0

__all__ = [
    "Deployment",
    "ServiceStatus",
    "down",
    "environment",
    "process_tag",
    "recover",
    "run_folder",
    "status",
    "up",
]

Progress = Callable[[str], None]


DEPLOYMENTS: tuple[Deployment, ...] = (  # the same as in prefect.yaml, less those of clusters
    Deployment("full", "flows.full.prosparse"),
    Deployment("settings", "flows.compare.compare"),
    Deployment("variant", "flows.evaluate.variant"),
    Deployment("variant", "flows.speed.variant"),
)


@dataclass(frozen=True)
class ServiceStatus:
    """What is running. ``server`` and ``worker`` are 'up' or 'down'; pids are None for what ``up`` did not start."""

    api_url: str
    owned: bool  # False: the user's own server, which `down` leaves alone
    server: str
    server_pid: int | None
    worker: str
    worker_pid: int | None
    pool: str | None
    deployments: list[str]  # "flow/deployment"
    waiting: list[str]  # deployments, here or on a cluster, whose runs no worker would take
    home: str
    log_files: list[str]


def up(
    home: Path,
    *,
    folder: Path | None = None,
    deployments: Sequence[Deployment] = DEPLOYMENTS,
    pool: str | None = None,
    progress: Progress | None = None,
) -> ServiceStatus:
    """Bring up whatever is missing of server, pool, deployments and worker; asks nothing, and twice is once.

    ``folder`` is where flow runs work and where ``prefect.toml`` goes (default: the repository, else the working
    directory). ``pool``: a cluster's, whose deployments in ``prefect.yaml`` are registered as well; it must exist, and
    its worker is started where the cluster can be reached, not here. Calls from several processes take turns. Raises
    EnvironmentProblem when a service does not come up, with its log and last lines, and BadInput when ``prefect.yaml``
    or the server has no such pool.
    """
    home, folder, say = _absolute(home), _absolute(folder or run_folder()), progress or _say_nothing
    of_cluster = cluster_deployments(run_folder(), pool, POOL) if pool else []
    with turn(home, on_wait=lambda: say("waiting for another `prosparse up` or `down`")):
        address = _find_address(home, folder)
        if address.owned:
            address = _bring_up_server(home, folder, address, say)
            if problem := write_pointer(folder, address.url):
                say(f"note: plain `prefect` commands need `export PREFECT_API_URL={address.url}` ({problem})")
        elif not address.healthy():
            raise EnvironmentProblem(
                f"no Prefect server answers at {address.url}, the address in your Prefect settings",
                hint="start it, or unset PREFECT_API_URL (or switch the profile) to let `prosparse up` start one",
            )
        else:
            say(f"server: yours, {address.url}")
        names = _register(address, folder, deployments)
        say(f"pool: {POOL}; deployments: {', '.join(names)}")
        if pool:
            require_pool(address, pool)
            names = _register(address, folder, of_cluster)
            say(f"pool: {pool}; deployments: {', '.join(names)}; its worker: prefect worker start --pool {pool}")
        _bring_up_worker(home, folder, address, say)
        return status(home, folder=folder)


def down(home: Path, *, folder: Path | None = None, progress: Progress | None = None) -> ServiceStatus:
    """Stop what ``up`` started: the worker first (it hangs without a server), then the server; twice is once.

    A flow run in progress is stopped with its worker and left Crashed: running the same command again resumes it.
    """
    home, folder, say = _absolute(home), _absolute(folder or run_folder()), progress or _say_nothing
    with turn(home, on_wait=lambda: say("waiting for another `prosparse up` or `down`")):
        if stop_service(home, "worker", STOP_TIMEOUT_S):
            say("worker: stopped")
            address = _find_address(home, folder)
            if address.healthy():
                for name in crash_dead_runs(address, _worker_name(home), find_service(home, "worker")):
                    say(f"run {name}: stopped, to be resumed")
        if stop_service(home, "server", STOP_TIMEOUT_S):
            say("server: stopped")
        remove_stale_pointer(folder)
        stop_orphans(home)
        return status(home, folder=folder)


def status(home: Path, *, folder: Path | None = None) -> ServiceStatus:
    """What is running now, by our process records and a few quick HTTP requests."""
    home, folder = _absolute(home), _absolute(folder or run_folder())
    address = _find_address(home, folder)
    server, worker = find_service(home, "server"), find_service(home, "worker")
    healthy = address.healthy()
    pool, deployments, idle = None, [], list[str]()
    if healthy:
        ours = {"work_pools": {"name": {"any_": [POOL]}}}
        pool = next((row["name"] for row in address.call("/work_pools/filter", ours)), None)
        found = address.call("/deployments/filter", ours)
        flows = {row["id"]: row["name"] for row in address.call("/flows/filter", ours)} if found else {}
        deployments = sorted(f"{flows.get(row['flow_id'], '?')}/{row['name']}" for row in found)
        idle = waiting(address, {deployment.entrypoint for deployment in DEPLOYMENTS})
    return ServiceStatus(
        api_url=address.url,
        owned=address.owned,
        server="up" if healthy else "down",
        server_pid=server.pid if server else None,
        worker="up" if worker else "down",
        worker_pid=worker.pid if worker else None,
        pool=pool,
        deployments=deployments,
        waiting=idle,
        home=str(home),
        log_files=[str(path) for name in ("server", "worker") if (path := log_file(home, name)).exists()],
    )


def environment(home: Path, *, folder: Path | None = None) -> dict[str, str]:
    """The variables every Prefect process of ours needs; put them into ``os.environ`` before Prefect is imported.

    ``PREFECT_API_URL`` is among them only while a server is up: without it Prefect starts a temporary one, on the
    same database under ``home``. Other variables the user has set are kept, except that PREFECT_HOME is theirs only
    together with their own server. What killed processes left behind (a ``prefect.toml`` that leads nowhere, temporary
    servers that nobody waits for) is removed on the way. EnvironmentProblem when PREFECT_API_URL leads nowhere.
    """
    home, folder = _absolute(home), _absolute(folder or run_folder())
    address = _find_address(home, folder)
    if not address.owned or address.healthy():
        return _variables(home, address) | {"PREFECT_API_URL": address.url}
    if url := os.environ.get("PREFECT_API_URL"):
        raise EnvironmentProblem(
            f"no Prefect server answers at PREFECT_API_URL={url}",
            hint="`prosparse up` starts one there; unset the variable to run without a server",
        )
    for place in {folder, Path.cwd()}:
        remove_stale_pointer(place)
    stop_orphans(home)
    return _variables(home, address)


def recover(home: Path, *, folder: Path | None = None) -> list[str]:
    """Mark as Crashed the flow runs that claim to be alive but whose process is gone, so that a retry is accepted.

    Gone means: the process named by ``process_tag`` or by our worker does not exist on this machine; or, for a run
    that nothing vouches for on our own server, no heartbeat for ``SILENCE_S`` seconds. Runs of other machines are
    left alone. Needs no running server, and stops temporary ones that nobody waits for.
    Returns the names of the runs it marked.
    """
    home, folder = _absolute(home), _absolute(folder or run_folder())
    with turn(home, on_wait=lambda: None):
        stop_orphans(home)
        address = _find_address(home, folder)
        if not address.owned or address.healthy():
            return crash_dead_runs(address, _worker_name(home), find_service(home, "worker"))
        address = _bring_up_server(home, folder, address, _say_nothing)
        try:
            return crash_dead_runs(address, _worker_name(home), find_service(home, "worker"))
        finally:
            stop_service(home, "server", STOP_TIMEOUT_S)


def run_folder() -> Path:
    """The repository when the package lives in one, else the working directory."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "prefect.yaml").exists() else Path.cwd()


def _find_address(home: Path, folder: Path) -> Address:
    server = find_service(home, "server")
    return find_address(folder, server.url if server else None)


def _variables(home: Path, address: Address) -> dict[str, str]:
    ours = {
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default of 20 is at the edge on a busy machine
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",  # these two let `--watch` show the log, errors included
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "DO_NOT_TRACK": "1",
    }
    variables = {key: os.environ.get(key) or value for key, value in ours.items()}
    return variables | ({"PREFECT_HOME": str(home / "prefect")} if address.owned else {})


def _bring_up_server(home: Path, folder: Path, address: Address, say: Progress) -> Address:
    """Our server, healthy: the one that runs already, or a new one at ``address`` or, if that is taken, beside it."""
    server = find_service(home, "server")
    known = server is not None
    if server is None:
        port = address.port()
        if not is_free(port):
            port = any_free_port()
            say(f"note: port {address.port()} is taken by something else, using {port}")
            address = Address(f"http://127.0.0.1:{port}/api", owned=True)
        say(f"server: starting at {address.url}")
        command = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
        server = _start(home, "server", command, address, folder)
    address = Address(server.url, owned=True)
    server.await_(home, address.healthy, START_TIMEOUT_S)
    say(f"server: {'already up' if known else 'up'}, dashboard at {address.url.removesuffix('/api')}")
    return address


def _bring_up_worker(home: Path, folder: Path, address: Address, say: Progress) -> None:
    worker = find_service(home, "worker")
    if worker and worker.url == address.url:
        say("worker: already up")
        return
    if worker:  # it polls an address that is ours no longer
        stop_service(home, "worker", STOP_TIMEOUT_S)
    name, started = _worker_name(home), time.time()
    command = ["worker", "start", "--pool", POOL, "--type", "process", "--name", name, "--limit", str(WORKER_LIMIT)]

    def is_polling() -> bool:
        rows = address.call(f"/work_pools/{POOL}/workers/filter", {"workers": {"status": {"any_": ["ONLINE"]}}})
        return any(row["name"] == name and timestamp(row["last_heartbeat_time"]) >= started for row in rows)

    _start(home, "worker", command, address, folder).await_(home, is_polling, START_TIMEOUT_S)
    say(f"worker: up, {WORKER_LIMIT} flow run at a time")


def _start(home: Path, name: str, command: list[str], address: Address, folder: Path) -> Service:
    env = os.environ | _variables(home, address)
    env |= {"PREFECT_API_URL": address.url, "PROSPARSE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    return start_service(home, name, command, address.url, folder, env)


def _register(address: Address, folder: Path, deployments: Sequence[Deployment]) -> list[str]:
    """Create or update the pool and the deployments (and, on our own server, the watch over silent runs)."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.flows import Flow, load_flow_from_entrypoint
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.utilities.callables import parameter_schema

    names = []
    with temporary_settings({PREFECT_API_URL: address.url}), get_client(sync_client=True) as client:
        if any(deployment.pool == POOL for deployment in deployments):
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            if (kind := client.read_work_pool(POOL).type) != "process":
                raise EnvironmentProblem(f"the work pool {POOL!r} at {address.url} is of type {kind!r}, not 'process'")
        here = [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}]
        for deployment in deployments:
            flow: Flow[..., Any] = load_flow_from_entrypoint(deployment.entrypoint, use_placeholder_flow=False)
            client.create_deployment(
                flow_id=client.create_flow_from_name(flow.name),
                name=deployment.name,
                entrypoint=deployment.entrypoint,
                description=flow.description,
                version=flow.version,
                work_pool_name=deployment.pool,
                job_variables=deployment.job_variables or {},
                parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
                enforce_parameter_schema=flow.should_validate_parameters,
                pull_steps=deployment.pull or here,
            )
            names.append(f"{flow.name}/{deployment.name}")
        if address.owned and not client.read_automations_by_name(_watch()["name"]):
            client.create_automation(AutomationCore.model_validate(_watch()))
    return names


def _watch() -> dict[str, Any]:
    """The automation that crashes a run whose heartbeat stopped: its process and its worker died together."""
    signs = ("heartbeat", "Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
    return {
        "name": "prosparse-silent-runs",
        "description": "Marks as Crashed the runs whose heartbeat stopped, so that they can be retried",
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": [f"prefect.flow-run.{sign}" for sign in signs],
            "threshold": 1,
            "within": SILENCE_S,
        },
        "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": f"Silent for {SILENCE_S} s"}],
    }


def _worker_name(home: Path) -> str:
    """Tells machines and homes apart on a shared server, and is the same after a restart."""
    return f"{socket.gethostname()}-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _say_nothing(_: str) -> None:
    pass
