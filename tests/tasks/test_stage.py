"""A stage trained by processes of its own: killed in every way, resumed to the bit, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from prosparse_core.errors import BadInput, EnvironmentProblem, ProSparseError
from prosparse_core.recipe import parse
from prosparse_core.store import Artifact, read_record
from tasks.preflight import check
from tasks.stage import train_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
A_FLOW = """
import json, pickle, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell has it ignored
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import make_run
from prosparse_core.recipe import parse
from tasks.stage import train_stage
run, _ = make_run(Path(sys.argv[2]), parse(json.loads(sys.argv[3])))
dense, corpora = pickle.loads(bytes.fromhex(sys.argv[4]))
train_stage(run, run.recipe.train, 0, dense, corpora, dense=dense)
"""


def recipe(base: Any, **runtime: Any) -> dict[str, Any]:
    """Short, but each step long enough to be interrupted in."""
    train = {"tokens_per_step": 256, "lr": 1e-3, "stages": [{"until_step": STEPS, "l1": 0}]}
    return {**base.recipe, "train": train, "runtime": {"threads": 1, "checkpoint_every_steps": 3, **runtime}}


def trained(base: Any, home: Path, kill_after: int | None = None, **runtime: Any) -> tuple[Artifact, Any]:
    """The stage in a home of its own, and what it said; rank 1 is killed after a step."""
    run, seen = dataclasses.replace(base, home=home).run(**recipe(base, **runtime))
    update = seen.update

    def watched(done: float, total: float, **fields: Any) -> None:
        update(done, total, **fields)
        if fields["step"] == kill_after:
            trainers(os.getpid())[1].kill()

    seen.update = watched
    return train_stage(run, run.recipe.train, 0, base.dense, base.corpora, dense=base.dense), seen


def hashes(stage: Artifact) -> dict[str, str]:
    return {f["path"]: f["sha256"] for f in read_record(stage.path)["files"] if not f["volatile"]}


def trainers(of: int) -> dict[int, psutil.Process]:
    """The trainers among the descendants of a process, by rank."""
    found = {}
    for process in psutil.Process(of).children(recursive=True):
        try:
            if (
                "prosparse_core.distributed.trainer" in process.cmdline()
                and "prosparse_core.distributed.launcher" not in process.cmdline()
            ):
                found[int(process.environ()["RANK"])] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for(condition: Any, limit_s: float = 300) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_in_every_way_and_resumed_to_the_bit(base: Any, tmp_path: Path) -> None:
    two = {"processes": 2, "parallel": "fsdp"}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    shutil.copytree(base.home, broken)
    whole, seen = trained(base, straight, **two)
    assert seen.updates[-1][:2] == (STEPS, STEPS)
    assert not (whole.path / "ranks").exists()

    with pytest.raises(ProSparseError, match="rank 1 was killed by SIGKILL") as caught:
        trained(base, broken, kill_after=5, **two)
    assert "goes on from its last checkpoint" in str(caught.value.hint)
    assert not trainers(os.getpid())

    artifacts = pickle.dumps((base.dense, base.corpora)).hex()
    arguments = [str(Path(__file__).parent), str(broken), json.dumps(recipe(base, **two)), artifacts]
    work = broken / "store" / ".work"
    for how, step in ((signal.SIGINT, 6), (signal.SIGTERM, 9), (signal.SIGKILL, 12)):
        flow = subprocess.Popen(
            [sys.executable, "-c", A_FLOW, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,  # of the KeyboardInterrupt
        )
        wait_for(
            lambda n=step, f=flow: (
                (any(work.glob(f"stage-*/checkpoints/step-{n:08d}")) and len(trainers(f.pid)) == 2)
                or f.poll() is not None
            )
        )
        family = [*psutil.Process(flow.pid).children(recursive=True)]
        assert len(trainers(flow.pid)) == 2
        flow.send_signal(how)
        assert flow.wait(60) != 0
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "orphans"
        assert len(gone) >= 3

    resumed, seen = trained(base, broken, **two)
    assert any(note.startswith("resuming after step") for note in seen.notes)
    assert seen.updates[0][0] > 12
    assert hashes(resumed) == hashes(whole)

    alone, _ = trained(base, tmp_path / "alone")
    assert sorted(hashes(alone)) == sorted(hashes(whole))
    for name in ("model/config.json", "model/generation_config.json", "model/tokenizer.json"):
        assert hashes(alone)[name] == hashes(whole)[name]
    logs = [(a.path / "log.jsonl").read_text().splitlines() for a in (whole, alone)]
    losses = [[json.loads(line)["lm_loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_trainers_own_error_is_the_steps(base: Any, tmp_path: Path) -> None:
    """Here: one process sees a damaged model. Nothing of it is left but the work folder."""
    dense = tmp_path / "dense"
    shutil.copytree(base.dense.path, dense)
    (dense / "model" / "config.json").write_text("{}")
    broken = dataclasses.replace(base, dense=dataclasses.replace(base.dense, folder=dense))
    with pytest.raises(ProSparseError, match=r"model/config.json is not what artifact.json says"):
        trained(broken, tmp_path / "home", processes=1)


def test_compiling_needs_a_compiler(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = parse({**base.recipe, **recipe(base, compile=True)})
    check(compiled, base.home)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match=r"runtime.compile=true, but \$CXX is 'no-such-compiler'"):
        check(compiled, base.home)


def test_more_processes_than_gpus_are_refused(base: Any) -> None:
    with pytest.raises(BadInput, match=r"runtime.processes=2, but this machine has \d GPU"):
        check(parse({**base.recipe, **recipe(base, processes=2, device="cuda")}), base.home)
