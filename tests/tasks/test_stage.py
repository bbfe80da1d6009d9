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
from tasks.mixture import mixture
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


def test_a_stage_watched_and_saved_is_the_same_stage(base: Any, tmp_path: Path) -> None:
    plain, _ = trained(base, tmp_path / "plain", monitor_every=0, checkpoint_every_steps=None)
    run, seen = dataclasses.replace(base, home=tmp_path / "watched").run(**recipe(base, monitor_every=20))
    watched = train_stage(run, run.recipe.train, 0, base.dense, base.corpora, dense=base.dense)
    assert watched.digest == plain.digest
    assert sum("held-out perplexity" in note for note in seen.notes) == 3
    assert "held_out_ppl" in seen.updates[-1][2]
    assert "held_out_ppl" not in seen.updates[18][2]
    found = run.ledger.query("SELECT step, corpus, perplexity, tokens FROM held_out_curve ORDER BY ALL").rows
    assert [(step, corpus) for step, corpus, *_ in found] == [
        (step, corpus) for step in (20, 40, 60) for corpus in ("code", "mixed", "more")
    ]
    assert all(perplexity > 1 and tokens == 256 * step for step, _, perplexity, tokens in found)
    cost = run.ledger.query("SELECT num_checkpoints, blocking_share FROM checkpoint_cost").rows
    assert [number for number, _ in cost] == [STEPS // 3 - 1]
    assert 0 < cost[0][1] < 1


def test_tracking_without_tensorboard_is_refused_before_it_starts(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = parse({**base.recipe, **recipe(base, tracking="tensorboard")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(EnvironmentProblem, match=r"runtime.tracking=tensorboard, but the package tensorboard"):
        check(tracked, base.home)


def test_compiling_needs_a_compiler(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = parse({**base.recipe, **recipe(base, compile=True)})
    check(compiled, base.home)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match=r"runtime.compile=true, but \$CXX is 'no-such-compiler'"):
        check(compiled, base.home)


def test_more_processes_than_gpus_are_refused(base: Any) -> None:
    with pytest.raises(BadInput, match=r"runtime.processes=2, but this machine has \d GPU"):
        check(parse({**base.recipe, **recipe(base, processes=2, device="cuda")}), base.home)


def test_a_later_stages_mixture_and_rate_leave_the_stages_before_it_as_they_are(base: Any) -> None:
    def train(*last: dict[str, Any], **changes: Any) -> tuple[list[Artifact], Artifact, Any]:
        stages = [{"until_step": 2, "l1": 0}, {"until_step": 4, "l1": 0.1, "lr": 2e-3}, *last]
        section = {"tokens_per_step": 128, "lr": 1e-3, "schedule": "constant", "stages": stages, **changes}
        run, seen = base.run(train=section)
        corpora = mixture(run, base.dense)
        made, before = [], base.dense
        for index in range(len(stages)):
            made.append(train_stage(run, run.recipe.train, index, before, corpora, dense=base.dense))
            before = made[-1]
        return made, corpora, seen

    first, corpora, _ = train({"until_step": 6, "l1": 0.1})
    assert corpora.digest == base.corpora.digest
    own = {"until_step": 60, "l1": 0.1, "mixture": {"more": 1}, "lr": 1e-4, "warmup_steps": 3}
    again, corpora, seen = train(own)
    assert corpora.digest == base.corpora.digest
    assert [a.folder for a in again[:2]] == [a.folder for a in first[:2]]
    assert again[2].folder != first[2].folder
    log = [json.loads(line) for line in (again[2].path / "log.jsonl").read_text().splitlines()]
    assert [entry["lr"] for entry in log[:4]] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4])
    meta = read_record(again[2].path)["meta"]
    assert meta["epochs"]["more"] > 1 > meta["epochs"]["code"] > 0
    assert f"more: by step 60 training has gone {meta['epochs']['more']:.1f} times over its text" in seen.notes

    falls = {"until_step": 5, "l1": 0.1, "phase": "decay"}
    wsd, _, _ = train(falls, schedule="wsd")
    longer, _, _ = train(falls, {"until_step": 6, "l1": 0.1, "phase": "sft", "lr": 1e-5}, schedule="wsd")
    assert [a.folder for a in longer[:3]] == [a.folder for a in wsd]


def test_a_corpus_of_weight_0_that_a_stage_trains_on_gets_its_windows(base: Any, tmp_path: Path) -> None:
    data = json.loads(json.dumps(base.recipe["data"]))
    data["sources"][1]["weight"] = 0
    stages = [{"until_step": 1, "l1": 0}, {"until_step": 2, "l1": 0, "mixture": {"more": 1}}]
    run, _ = base.run(data=data, train={"tokens_per_step": 128, "lr": 1e-3, "stages": stages})
    corpora = mixture(run, base.dense)
    assert [(e["name"], e["trained"], e["samples_per_block"]) for e in corpora_of(corpora)] == [
        ("code", True, 1024), ("more", True, 0),
    ]  # fmt: skip
    before = base.dense
    for index in (0, 1):
        before = train_stage(run, run.recipe.train, index, before, corpora, dense=base.dense)
    run, _ = base.run(data=data)
    assert [e["trained"] for e in corpora_of(mixture(run, base.dense))] == [True, False]


def test_keeping_documents_apart_is_part_of_a_stage_and_not_of_the_mixture(base: Any) -> None:
    data = {**base.recipe["data"], "attend_across_documents": True}
    train = {"tokens_per_step": 2048, "lr": 1e-3, "stages": [{"until_step": 1, "l1": 0}]}
    losses = []
    for changes in ({}, {"data": data}):
        run, _ = base.run(train=train, **changes)
        corpora = mixture(run, base.dense)
        assert corpora.folder == base.corpora.folder
        stage = train_stage(run, run.recipe.train, 0, base.dense, corpora, dense=base.dense)
        losses.append(json.loads((stage.path / "log.jsonl").read_text())["lm_loss"])
    assert losses[0] != losses[1]


def corpora_of(corpora: Artifact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((corpora.path / "manifest.json").read_text())["corpora"]
    return found
