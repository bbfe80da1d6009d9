"""Real background processes, with a stand-in for the `prefect` command that starts in no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.service_process import find_service, log_file, start_service, stop_orphans, stop_service, turn
from prosparse_core.errors import EnvironmentProblem

# Run as `python -m prefect VERB`: the working directory comes first on sys.path.
STAND_IN = """
import os, signal, subprocess, sys, time
print("started as", sys.argv[1], "in", os.getcwd(), "session", os.getsid(0) == os.getpid(), flush=True)
if sys.argv[1] == "crash":
    raise TypeError("Body() got an unexpected keyword argument")
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "family":
    print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
print("ready", os.environ["MARK"], flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    package = tmp_path / "folder/prefect"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return package.parent


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    yield home
    stop_service(home, "server", timeout_s=0.5)


def start(home: Path, folder: Path, verb: str) -> int:
    env = os.environ | {"MARK": "blue"}
    service = start_service(home, "server", [verb], "http://127.0.0.1:1/api", folder, env)
    service.await_(home, lambda: "ready" in log_file(home, "server").read_text()[service.log_offset :], timeout_s=20.0)
    return service.pid


def test_started_found_and_stopped(home: Path, folder: Path) -> None:
    pid = start(home, folder, "sleep")
    service = find_service(home, "server")
    assert service is not None
    assert (service.pid, service.url) == (pid, "http://127.0.0.1:1/api")
    assert f"started as sleep in {folder} session True\nready blue\n" == log_file(home, "server").read_text()
    assert stop_service(home, "server", timeout_s=5.0)
    assert not psutil.pid_exists(pid)
    assert find_service(home, "server") is None
    assert not stop_service(home, "server", timeout_s=5.0)


def test_a_stubborn_one_and_a_family_are_stopped_with_force(home: Path, folder: Path) -> None:
    pid = start(home, folder, "stubborn")
    assert stop_service(home, "server", timeout_s=0.3)
    assert not psutil.pid_exists(pid)
    start(home, folder, "family")
    child = int(log_file(home, "server").read_text().split("child ")[-1].split()[0])
    assert stop_service(home, "server", timeout_s=0.3)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_one_that_was_killed_is_not_running(home: Path, folder: Path) -> None:
    pid = start(home, folder, "sleep")
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while find_service(home, "server") is not None:
        assert time.monotonic() < deadline
    assert start(home, folder, "sleep") != pid


STRANGER = {"name": "server", "command": ["python", "-m", "prefect"], "url": "", "log_offset": 0}


@pytest.mark.parametrize(
    "record",
    [
        pytest.param("", id="empty"),
        pytest.param('{"name": "server", "pi', id="torn"),
        pytest.param("4711", id="bare pid"),
        pytest.param(json.dumps(STRANGER | {"pid": os.getpid(), "colour": "red"}), id="other fields"),
        pytest.param(json.dumps(STRANGER | {"pid": os.getpid()}), id="pid of a stranger"),
        pytest.param(json.dumps(STRANGER | {"pid": 2**22 + 1}), id="no such pid"),
    ],
)
def test_a_stale_record_is_nobody(home: Path, folder: Path, record: str) -> None:
    path = home / "prefect/prosparse-server.json"
    path.parent.mkdir(parents=True)
    path.write_text(record)
    assert find_service(home, "server") is None
    assert not stop_service(home, "server", timeout_s=1.0)
    assert not path.exists()
    start(home, folder, "sleep")
    assert find_service(home, "server") is not None


def test_death_at_start_is_told_with_the_log_of_this_start_only(home: Path, folder: Path) -> None:
    start(home, folder, "sleep")
    stop_service(home, "server", timeout_s=5.0)
    with pytest.raises(EnvironmentProblem, match="the Prefect server died while starting") as caught:
        start(home, folder, "crash")
    text = str(caught.value)
    assert str(log_file(home, "server")) in text
    assert "TypeError: Body() got an unexpected keyword argument" in text
    assert "started as crash" in text
    assert "started as sleep" not in text
    assert find_service(home, "server") is None


def test_slowness_is_told_and_leaves_it_running(home: Path, folder: Path) -> None:
    start(home, folder, "sleep")
    service = find_service(home, "server")
    assert service is not None
    with pytest.raises(EnvironmentProblem, match=r"not ready after 0 s(.|\n)*ready blue"):
        service.await_(home, lambda: False, timeout_s=0.3)
    assert service.is_alive()


def test_turns_exclude_each_other_and_die_with_their_holder(home: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from flows.service_process import turn\n"
            "with turn(Path(sys.argv[1]), lambda: None): print('held', flush=True); time.sleep(60)",
            str(home),
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        waited = threading.Event()
        entered = threading.Event()

        def enter() -> None:
            with turn(home, waited.set):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert waited.wait(10.0)
        assert not entered.wait(0.2)
        holder.kill()
        assert entered.wait(10.0)
        thread.join()


def test_only_orphaned_temporary_servers_of_this_home_are_stopped(home: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    linger = "; sys.stdout.flush(); import time; time.sleep(60)"

    def temporary_server(of: Path, *, orphan: bool) -> tuple[psutil.Process, subprocess.Popen[bytes]]:
        env = os.environ | {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_HOME": str(of / "prefect")}
        parent = subprocess.Popen(
            [sys.executable, "-c", code if orphan else code + linger], env=env, stdout=subprocess.PIPE
        )
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        if orphan:
            parent.wait()
        return server, parent

    started = [
        temporary_server(home, orphan=True),
        temporary_server(home, orphan=False),
        temporary_server(home / "another", orphan=True),
    ]
    orphan, in_use, foreign = (server for server, _ in started)
    try:
        assert stop_orphans(home) == 1
        psutil.wait_procs([orphan], timeout=5.0)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert in_use.is_running()
        assert foreign.is_running()
    finally:
        for server, parent in started:
            if server.is_running():
                server.kill()
            parent.kill()
            parent.communicate()
