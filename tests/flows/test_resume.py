"""kill -9 anywhere, the same command again: finished stages are skipped and the final weights are bitwise equal."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prosparse_core.ledger import Ledger
from prosparse_core.store import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["run", "tiny", "--inline", "--until", "stage", "--set", "runtime.checkpoint_every_steps=4"]
DIE_IN_A_CHECKPOINT = """
import os, sys
import prosparse_core.checkpoint as checkpoint
calls = 0
class Deadly:
    def __getattr__(self, name): return getattr(os, name)
    def replace(self, *paths):
        global calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), 9)
        os.replace(*paths)
checkpoint.os = Deadly()
from flows.cli import main
sys.exit(main(sys.argv[1:]))
"""


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PROSPARSE_HOME": str(home)}


def start(home: Path, *prefix: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(prefix or ("-m", "flows.cli")), *ARGUMENTS]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(home: Path) -> str:
    process = start(home)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def final_weights(home: Path) -> dict[int, tuple[str, str]]:
    """Stage -> hashes of its weights and its optimizer's state."""
    found = {}
    for folder in (home / "store" / "stage").iterdir():
        record = read_record(folder)
        hashes = {f["path"]: f["sha256"] for f in record["files"]}
        found[record["meta"]["stage"]] = (hashes["model/model.safetensors"], hashes["optimizer.pt"])
    return found


def wait_for(condition: object, process: subprocess.Popen[str], limit_s: float = 120) -> None:
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.stdout and process.stdout.read()}"
        assert time.monotonic() - began < limit_s
        time.sleep(0.01)


def logged_steps(home: Path) -> int:
    return sum(len(p.read_bytes().splitlines()) for p in (home / "store").glob("**/log.jsonl"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose stages ran without interruption."""
    home = tmp_path_factory.mktemp("straight")
    finish(home)
    return home


@pytest.fixture
def prepared(straight: Path, tmp_path: Path) -> Path:
    """A home in which all is done up to the stages."""
    home = tmp_path / "home"
    shutil.copytree(straight, home)
    shutil.rmtree(home / "store" / "stage")
    return home


def test_kill_at_a_random_step(straight: Path, prepared: Path) -> None:
    at = random.randrange(6, 55)
    process = start(prepared)
    wait_for(lambda: logged_steps(prepared) >= at, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(prepared)
    assert final_weights(prepared) == final_weights(straight), f"killed at step {at}\n{output}"
    assert "resuming after step" in output or "stage 0" in output


def test_kill_during_a_checkpoint_write(straight: Path, prepared: Path) -> None:
    process = start(prepared, "-c", DIE_IN_A_CHECKPOINT)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = list((prepared / "store" / ".work").glob("stage-*/checkpoints/*"))
    assert any(p.name.endswith(".tmp") for p in left), left
    output = finish(prepared)
    assert "resuming after step 4" in output
    assert final_weights(prepared) == final_weights(straight)


def test_kill_between_stages(straight: Path, prepared: Path) -> None:
    process = start(prepared)
    stages = prepared / "store" / "stage"
    wait_for(lambda: stages.is_dir() and len(list(stages.iterdir())) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(prepared)
    assert output.count("cached") >= 5  # model, mixture, substitute, stage 0, stage 1
    assert final_weights(prepared) == final_weights(straight)


def test_two_runs_at_once_share_the_work(straight: Path, prepared: Path) -> None:
    processes = [start(prepared) for _ in range(2)]
    outputs = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert final_weights(prepared) == final_weights(straight)
    done = Ledger(prepared).query("SELECT count(*) FROM steps WHERE step = 'stage' AND status = 'done'").rows[0][0]
    assert done == 4 + 4, "four stages in the copied ledger's run, and each of the four made once more, not twice"


def test_a_killed_run_can_be_told_from_a_living_one(prepared: Path) -> None:
    process = start(prepared)
    wait_for(lambda: logged_steps(prepared) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [r[0] for r in Ledger(prepared).query("SELECT status FROM runs ORDER BY started_at").rows][-1] == "running"
    command = [sys.executable, "-c", "from flows.run import *; print(mark_dead_runs(home_folder()))"]
    subprocess.run(command, cwd=ROOT, env=environment(prepared), check=True)
    assert [r[0] for r in Ledger(prepared).query("SELECT status FROM runs ORDER BY started_at").rows][-1] == "failed"
