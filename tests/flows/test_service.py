"""Status and environment against a stand-in API; then the real thing, once."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows import service, service_address
from flows.service_address import MARK, any_free_port, pointer_url
from prosparse_core.errors import EnvironmentProblem

ROOT = Path(__file__).parents[2]

# What Prefect 3.8 answers, less the fields that are not read.
API: dict[str, Any] = {
    "/api/health": True,
    "/api/work_pools/filter": [{"name": "default"}, {"name": "prosparse"}],
    "/api/deployments/filter": [
        {"name": "full", "flow_id": "f1", "work_pool_name": "prosparse", "entrypoint": "flows.full.prosparse"},
        {"name": "settings", "flow_id": "f2", "work_pool_name": "prosparse", "entrypoint": "flows.compare.compare"},
    ],
    "/api/flows/filter": [{"id": "f2", "name": "compare"}, {"id": "f1", "name": "prosparse"}],
}


class StandInApi(BaseHTTPRequestHandler):
    """Filters pools by name as Prefect does, so that the request is tested too."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, sent: dict[str, Any]) -> None:
        found = API[self.path]
        if self.path == "/api/work_pools/filter" and "work_pools" in sent:
            found = [row for row in found if row["name"] in sent["work_pools"]["name"]["any_"]]
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInApi) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the shell of somebody who has never used Prefect."""
    for key in os.environ:
        if key.startswith(("PREFECT", "PROSPARSE", "DO_NOT_TRACK")):
            monkeypatch.delenv(key)
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)


def test_status_of_nothing(tmp_path: Path) -> None:
    found = service.status(tmp_path / "home", folder=tmp_path)
    assert found == service.ServiceStatus(
        api_url="http://127.0.0.1:4200/api",
        owned=True,
        server="down",
        server_pid=None,
        worker="down",
        worker_pid=None,
        pool=None,
        deployments=[],
        waiting=[],
        home=str(tmp_path / "home"),
        log_files=[],
    )
    assert not (tmp_path / "home").exists()


def test_status_of_a_server_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", api)
    found = service.status(tmp_path / "home", folder=tmp_path)
    assert (found.api_url, found.owned, found.server, found.server_pid) == (api, False, "up", None)
    assert found.pool == "prosparse"
    assert found.deployments == ["compare/settings", "prosparse/full"]
    assert found.worker == "down"


def test_status_does_not_take_a_neighbours_server_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    """Another home's server may hold the default port."""
    monkeypatch.setattr(service_address, "DEFAULT_URL", api)
    found = service.status(tmp_path / "home", folder=tmp_path)
    assert (found.server, found.pool, found.deployments) == ("down", None, [])


def test_environment_without_a_server_clears_what_leads_nowhere(tmp_path: Path) -> None:
    pointer = tmp_path / "prefect.toml"
    pointer.write_text(f'{MARK}[api]\nurl = "http://127.0.0.1:{any_free_port()}/api"\n')
    variables = service.environment(tmp_path / "home", folder=tmp_path)
    assert "PREFECT_API_URL" not in variables
    assert variables["PREFECT_HOME"] == str(tmp_path / "home/prefect")
    assert variables["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "true"
    assert int(variables["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"]) == 120
    assert int(variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == 30
    assert (variables["PREFECT_SERVER_ANALYTICS_ENABLED"], variables["DO_NOT_TRACK"]) == ("false", "1")
    assert not pointer.exists()


def test_environment_keeps_what_the_user_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str) -> None:
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")
    monkeypatch.setenv("PREFECT_API_URL", api)
    variables = service.environment(tmp_path / "home", folder=tmp_path)
    assert variables["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "600"
    assert variables["PREFECT_API_URL"] == api
    assert "PREFECT_HOME" not in variables  # their key may be in a profile there


def test_an_address_that_leads_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{any_free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(EnvironmentProblem, match=url) as caught:
        service.environment(tmp_path / "home", folder=tmp_path)
    assert "prosparse up" in (caught.value.hint or "")


def test_up_refuses_a_server_of_the_users_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", api.replace("/api", "/nothing-here"))
    monkeypatch.setitem(API, "/nothing-here/health", "not Prefect")
    with pytest.raises(EnvironmentProblem, match="nothing-here"):
        service.up(tmp_path / "home", folder=tmp_path)


def test_down_of_nothing_is_quiet(tmp_path: Path) -> None:
    said: list[str] = []
    assert service.down(tmp_path / "home", folder=tmp_path, progress=said.append).server == "down"
    assert said == []


def test_importing_is_instant_and_without_prefect() -> None:
    code = "import sys, flows.service; print(sorted({'prefect', 'torch', 'rich'} & set(sys.modules)))"
    started = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
    assert time.monotonic() - started < 5.0  # a tenth of that on an idle machine


def test_prefect_yaml_and_up_make_the_same_deployments() -> None:
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    here = [entry for entry in entries if entry["work_pool"]["name"] == service.POOL]
    assert [(entry["name"], entry["entrypoint"]) for entry in here] == [
        (deployment.name, deployment.entrypoint) for deployment in service.DEPLOYMENTS
    ]
    assert here[0] == {"name": "full", "entrypoint": "flows.full.prosparse", "work_pool": {"name": "prosparse"}}
    assert service.run_folder() == ROOT


@pytest.mark.parametrize("deployment", service.DEPLOYMENTS)
def test_entry_points_exist(deployment: service.Deployment) -> None:
    module, name = deployment.entrypoint.rsplit(".", 1)
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# The real thing

FLOW = """
import os, time
from prefect import flow, task
from prefect.states import Completed

@task(task_run_name="{name}", persist_result=False)
def step(name: str, *, recipe: str):
    if name == "base_model":
        return Completed(name="Cached", message="in the store")
    if recipe == "wrong":
        raise ValueError("asked to fail")

@flow(name="prosparse", persist_result=False)
def prosparse(recipe: str = "smollm2-135m", overrides: list[str] | None = None):
    step("base_model", recipe=recipe)
    with open(os.environ["PROSPARSE_HOME"] + "/ran", "a") as out:
        print(recipe, os.getcwd(), file=out)
    if recipe == "long":
        time.sleep(300)
    step("stage 0", recipe=recipe)
"""

UP = """
import sys
from pathlib import Path
from flows import service, service_address
service_address.DEFAULT_URL = sys.argv[1]
deployments = [service.Deployment("full", "silent_flow.prosparse")]
found = service.up(Path("home"), folder=Path.cwd(), deployments=deployments, progress=print)
print(found.server_pid, found.worker_pid, found.api_url, *found.deployments)
"""


def wait_for(condition: Any, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return value


@pytest.mark.slow
def test_from_nothing_to_watched_runs_and_back(tmp_path: Path, api: str) -> None:
    """Two calls at once, a taken port, plain commands in a clean shell, kill -9 of flow and worker, and down."""
    home, folder = tmp_path / "home", tmp_path
    (folder / "silent_flow.py").write_text(FLOW)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}
    command = [sys.executable, "-c", UP, api]  # the stand-in holds the default port
    calls = [subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [call.communicate(timeout=240)[0].splitlines() for call in calls]
    try:
        assert [call.returncode for call in calls] == [0, 0], told
        assert told[0][-1] == told[1][-1]
        found = service.status(home, folder=folder)
        assert told[0][-1] == f"{found.server_pid} {found.worker_pid} {found.api_url} prosparse/full"
        assert (found.owned, found.server, found.worker, found.pool) == (True, "up", "up", "prosparse")
        assert found.api_url != api
        assert sum("is taken by something else" in line for lines in told for line in lines) == 1
        assert tomllib.loads((folder / "prefect.toml").read_text()) == {"api": {"url": found.api_url}}
        assert service.environment(home, folder=folder)["PREFECT_API_URL"] == found.api_url

        # Both at once: the worker takes one at a time.
        runs = {
            recipe: subprocess.Popen(
                [sys.executable, "-m", "prefect", *f"deployment run prosparse/full --watch -p recipe={recipe}".split()],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "user"), "COLUMNS": "200", "DO_NOT_TRACK": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for recipe in ("tiny", "wrong")
        }
        shown = {recipe: run.communicate(timeout=240)[0] for recipe, run in runs.items()}
        assert {recipe: run.returncode for recipe, run in runs.items()} == {"tiny": 0, "wrong": 1}, shown
        assert "ValueError: asked to fail" in shown["wrong"]
        assert sorted((home / "ran").read_text().splitlines()) == [f"tiny {folder}", f"wrong {folder}"]

        address = service_address.Address(found.api_url, owned=True)
        task_runs = address.call("/task_runs/filter", {})
        states = sorted((row["name"], row["state_name"]) for row in task_runs)
        assert states == [("base_model", "Cached")] * 2 + [("stage 0", "Completed"), ("stage 0", "Failed")]
        (error,) = [row["state"]["message"] for row in task_runs if row["state_name"] == "Failed"]
        assert "ValueError: asked to fail" in error

        full = address.call("/deployments/name/prosparse/full")["id"]
        address.call(f"/deployments/{full}/create_flow_run", {"parameters": {"recipe": "long"}})
        wait_for(lambda: "long" in (home / "ran").read_text())
        claim = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        (run,) = wait_for(lambda: address.call("/flow_runs/filter", claim))
        assert service.recover(home, folder=folder) == []
        assert found.worker_pid is not None
        for pid in (found.worker_pid, int(run["infrastructure_pid"])):
            psutil.Process(pid).kill()
        wait_for(lambda: service.status(home, folder=folder).worker == "down")
        assert service.recover(home, folder=folder) == [run["name"]]
        assert address.call(f"/flow_runs/{run['id']}")["state_type"] == "CRASHED"
    finally:
        gone = service.down(home, folder=folder)
    assert (gone.server, gone.worker, gone.server_pid, gone.worker_pid) == ("down", "down", None, None)
    assert pointer_url(folder) is None
    assert not psutil.pid_exists(found.server_pid or 0)
    assert not (tmp_path / "user/.prefect/profiles.toml").exists()
