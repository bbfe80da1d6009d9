"""Checkpoints written while training goes on: what is on disk at any moment is resumed to the bit; and how often."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from short_stage import TIMING, Interrupted, Notes, equal, lines, train

from prosparse_core import checkpoint
from prosparse_core.checkpoint_pace import SHORTEST_S, Clock, Pace, expected
from prosparse_core.distributed import checkpoint_shards
from prosparse_core.errors import EnvironmentProblem
from prosparse_core.recipe import Runtime
from prosparse_core.training_log import CHECKPOINT_LOG, CHECKPOINTS


def test_killed_during_a_background_write_and_resumed_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process killed two steps after it began a checkpoint leaves: the one before, and half of this one."""
    straight, log = train(tmp_path / "straight", dropout=0.3)
    gate, finish = threading.Event(), checkpoint_shards.finish

    def held(writing: Any, folder: Path, state: Any, *rest: Any) -> int:
        if state["step"] == 8:
            assert gate.wait(60)
        return finish(writing, folder, state, *rest)

    def die() -> None:
        shutil.copytree(tmp_path / "killed", tmp_path / "left")
        gate.set()

    monkeypatch.setattr(checkpoint_shards, "finish", held)
    train(tmp_path / "killed", progress=Notes(10, die), checkpoint_every_steps=4, dropout=0.3)
    names = sorted(p.name for p in (tmp_path / "left" / CHECKPOINTS).iterdir())
    assert names[-1] == "step-00000004"
    assert len(names) == 2
    notes = Notes()
    resumed, log_resumed = train(tmp_path / "left", progress=notes, dropout=0.3)
    assert "resuming after step 4" in notes.notes
    assert equal(straight, resumed)
    for a, b in zip(log, log_resumed, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMING} == {k: v for k, v in b.items() if k not in TIMING}


def test_the_copy_is_of_the_step_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    with checkpoint.Writer(tmp_path, model, optimizer) as writer:
        writer.save(1)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
        optimizer.state.clear()
    assert checkpoint.restore(tmp_path, model, optimizer, Notes()) == (1, {})
    assert equal(wanted, model.state_dict())
    assert len(optimizer.state) == 2


def test_a_full_disk_in_the_background_ends_the_run_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = checkpoint_shards.finish

    def full(writing: Any, folder: Path, state: Any, *rest: Any) -> int:
        if state["step"] > 4:
            writing.result()
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(writing, folder, state, *rest)

    monkeypatch.setattr(checkpoint_shards, "finish", full)
    for name, every, last in (("next", 2, 8), ("end", 7, 12)):
        if name == "end":
            train(tmp_path / name, progress=Notes(5), checkpoint_every_steps=4)
        notes = Notes()
        with pytest.raises(EnvironmentProblem, match=r"the disk of .* is full: the checkpoint of step") as caught:
            train(tmp_path / name, progress=notes, checkpoint_every_steps=every)
        assert "the checkpoint before" in str(caught.value.hint)
        left = sorted(p.name for p in (tmp_path / name / CHECKPOINTS).iterdir())
        assert left == ["step-00000004"], name
        assert lines(tmp_path / name / "log.jsonl")[-1]["step"] == last


def test_an_error_of_the_loop_is_told_before_one_of_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_shards, "finish", lambda *a: 1 / 0)
    model = torch.nn.Linear(4, 4)
    writer = checkpoint.Writer(tmp_path, model, torch.optim.AdamW(model.parameters()))

    def loop() -> None:
        with writer:
            writer.save(1)
            raise Interrupted

    with pytest.raises(Interrupted):
        loop()


def test_what_checkpoints_cost_is_kept(tmp_path: Path) -> None:
    notes = Notes()
    train(tmp_path, progress=notes, checkpoint_every_steps=4)
    kept = lines(tmp_path / CHECKPOINT_LOG)
    assert [(e["stage"], e["step"]) for e in kept] == [(1, 4), (1, 8)]
    assert all(e["bytes"] > 10_000 and e["blocking_s"] > 0 and e["write_s"] > 0 for e in kept)
    assert any("for 2 checkpoints" in note for note in notes.notes)


def test_the_state_of_a_gpus_generator_goes_into_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a machine without one can tell."""
    state = [torch.tensor([1, 2, 3], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state[0].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new: state.__setitem__(0, new.clone()))
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with checkpoint.Writer(tmp_path, model, optimizer) as writer:
        writer.save(1)
    state[0] = torch.tensor([9, 9, 9], dtype=torch.uint8)
    checkpoint.restore(tmp_path, model, optimizer, Notes())
    assert state[0].tolist() == [1, 2, 3]
    monkeypatch.undo()  # and one of a GPU is resumed where there is none
    checkpoint.restore(tmp_path, model, optimizer, Notes())


@pytest.mark.parametrize(
    ("blocking", "write", "on_cpu", "interval"),
    [
        (4.0, 30.0, False, 200.0),  # 4 s of 200 are 2 %
        (4.0, 300.0, False, 304.0),  # the next cannot begin before
        (4.0, 30.0, True, 1700.0),  # the cores write instead of training
        (0.1, 0.1, False, SHORTEST_S),
    ],
)
def test_the_interval_follows_from_the_cost(blocking: float, write: float, on_cpu: bool, interval: float) -> None:
    assert Pace(blocking, write, on_cpu).interval_s(0.02) == pytest.approx(interval)


def test_the_clock_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(Runtime(checkpoint_overhead=0.1), 4e9, on_cpu=False)
    assert clock.pace == expected(4e9, processes=1, nodes=1, on_cpu=False)
    clock.measured(30.0, 50.0)
    assert clock.interval_s == pytest.approx(300.0)
    now[0] += 299.0
    assert not clock.is_due()
    now[0] += 2.0
    assert clock.is_due()
    clock.saved()
    assert not clock.is_due()
    assert Clock(Runtime(checkpoint_every_minutes=3), 4e9, on_cpu=False).interval_s == 180.0
