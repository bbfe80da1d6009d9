"""Bad steps: told from good ones, left out or taken back by rule, recorded, and the same after any interruption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from short_stage import STEPS, Notes, SpoiltMixture, equal, lines, recipe, train

from prosparse_core.errors import ProSparseError
from prosparse_core.guard import EVENTS, Guard
from prosparse_core.recipe_train import Spike

NAN = float("nan")


def test_a_spike_is_told_by_mean_and_deviation() -> None:
    guard = Guard(recipe(spike=Spike(sigma=3.0, window=8)))
    generator = np.random.default_rng(0)
    taken: list[float] = []
    for i in range(60):
        loss = float(generator.normal(2.0, 0.1)) + (1.0 if i % 7 == 6 else 0.0)
        latest = np.array(taken[-8:])
        wanted = len(latest) >= 4 and loss > latest.mean() + 3 * latest.std(ddof=1)
        verdict = guard.judge(loss, 1.0 + 1e-9 * i)
        assert (verdict is not None and "loss" in verdict.reason) == wanted, i
        if verdict is None:
            taken.append(loss)
    assert len(taken) < 60
    calm = Guard(recipe(spike=Spike(sigma=3.0, window=4)))
    assert all(calm.judge(2.0 + i % 2 / 10, 1.0 + i % 2 / 10) is None for i in range(4))
    assert "gradient norm 9" in str(calm.judge(2.0, 9.0))


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (math.inf, 1.0), (2.0, NAN), (2.0, math.inf)])
def test_what_is_no_number_is_bad_without_any_rule(loss: float, norm: float) -> None:
    guard = Guard(recipe())
    assert guard.judge(1e9, 1e9) is None
    verdict = guard.judge(loss, norm)
    assert verdict is not None
    assert verdict.action == "skip"
    assert not verdict.takes_step


def test_the_state_of_the_guard_goes_through_json_to_the_bit() -> None:
    train_ = recipe(spike=Spike(sigma=2.0, window=6))
    one, generator = Guard(train_), np.random.default_rng(1)
    numbers = [(float(a), float(b)) for a, b in generator.gamma(2.0, 1.0, (40, 2))]
    for pair in numbers[:20]:
        one.judge(*pair)
    other = Guard(train_, json.loads(json.dumps(one.state())))
    assert [one.judge(*p) for p in numbers[20:]] == [other.judge(*p) for p in numbers[20:]]


def test_a_skipped_step_leaves_the_weights_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = train(tmp_path / "before", progress=Notes(STEPS - 1))
    notes = Notes()
    mixture = SpoiltMixture({STEPS: NAN}).spoil(monkeypatch)
    after, log = train(tmp_path / "after", mixture, notes)
    assert equal(after, before)
    assert [e["step"] for e in log if e["skipped"]] == [STEPS]
    (event,) = lines(tmp_path / "after" / EVENTS)
    assert (event["step"], event["action"], event["first_step"]) == (STEPS, "skip", None)
    assert "not finite: loss nan" in event["reason"]
    assert any("skipped" in note for note in notes.notes)


def test_a_healthy_run_is_the_same_under_every_rule(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain")
    for name, rules in {
        "fail": {"on_non_finite": "fail"},
        "rollback": {"on_non_finite": "rollback", "spike": Spike(sigma=50.0, window=4, action="rollback")},
    }.items():
        ruled, _ = train(tmp_path / name, **rules)
        assert equal(plain, ruled)
        assert not (tmp_path / name / EVENTS).exists()


def test_a_rollback_takes_back_the_steps_before_wherever_checkpoints_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its twin leaves out the same steps one by one."""
    spoilt = SpoiltMixture({7: NAN, 8: NAN}).spoil(monkeypatch)
    twin, _ = train(tmp_path / "twin", spoilt)
    monkeypatch.undo()
    for name, every in {"each": 1, "some": 3, "none": None}.items():
        mixture = SpoiltMixture({8: NAN}).spoil(monkeypatch)
        rules = {"on_non_finite": "rollback", "rollback_steps": 1, "checkpoint_every_steps": every}
        back, log = train(tmp_path / name, mixture, **rules)
        monkeypatch.undo()
        assert equal(back, twin), name
        assert [e["step"] for e in log] == list(range(2, STEPS + 1))
        assert [e["step"] for e in log if e["skipped"]] == [7, 8]
        (event,) = lines(tmp_path / name / EVENTS)
        assert (event["step"], event["first_step"], event["action"]) == (8, 7, "rollback")


def test_a_spike_is_rolled_back_and_dropout_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"spike": Spike(sigma=20.0, window=4, action="rollback"), "rollback_steps": 2, "dropout": 0.5}
    found = []
    for name, every in {"each": 1, "none": None}.items():
        mixture = SpoiltMixture({9: 30.0}).spoil(monkeypatch)
        found.append(train(tmp_path / name, mixture, checkpoint_every_steps=every, **rules))
        monkeypatch.undo()
        (event,) = lines(tmp_path / name / EVENTS)
        assert event["reason"].startswith("spike: ")
    assert equal(found[0][0], found[1][0])


def test_killed_while_a_rollback_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"on_non_finite": "rollback", "rollback_steps": 3, "checkpoint_every_steps": 2}
    mixture = SpoiltMixture({9: NAN}).spoil(monkeypatch)
    straight, _ = train(tmp_path / "straight", mixture, **rules)

    class StopOnSecond(Notes):
        def update(self, done: float, total: float, **fields: float | int | str) -> None:
            if (self.notes and "taken back" in self.notes[-1]) or any("resuming" in n for n in self.notes):
                super().update(done, total, **fields)

    broken = tmp_path / "broken"
    train(broken, mixture, StopOnSecond(7), **rules)
    assert [e["step"] for e in lines(broken / EVENTS)] == [9]
    resumed, log = train(broken, mixture, **rules)
    assert equal(straight, resumed)
    assert [e["step"] for e in lines(broken / EVENTS)] == [9]
    assert [e["step"] for e in log if e["skipped"]] == [6, 7, 8, 9]


def test_a_checkpoint_of_a_taken_back_step_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the record of a rollback and the removal of the checkpoints it makes void."""
    rules = {"on_non_finite": "rollback", "rollback_steps": 3, "checkpoint_every_steps": 1}
    mixture = SpoiltMixture({9: NAN}).spoil(monkeypatch)
    straight, _ = train(tmp_path / "straight", mixture, **rules)
    broken = tmp_path / "broken"
    train(broken, mixture, Notes(8), **rules)
    shutil.copy(tmp_path / "straight" / EVENTS, broken / EVENTS)
    resumed, _ = train(broken, mixture, **rules)
    assert equal(straight, resumed)


@pytest.mark.parametrize(
    ("factors", "options", "said"),
    [
        ({5: NAN, 6: NAN, 7: NAN}, {}, "step 7: not finite.*3 in a row"),
        ({3: NAN, 5: NAN, 7: NAN}, {"max_bad_steps": 2}, r"step 7.*3 in this stage \(train.max_bad_steps\)"),
        ({5: NAN}, {"on_non_finite": "fail"}, "stage 1, step 5: not finite"),
    ],
)
def test_too_many_bad_steps_end_the_stage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factors: dict[int, float],
    options: dict[str, object],
    said: str,
) -> None:
    mixture = SpoiltMixture(factors).spoil(monkeypatch)
    with pytest.raises(ProSparseError, match=said) as caught:
        train(tmp_path, mixture, **options)
    assert "lower train.lr" in str(caught.value.hint)


def test_an_ignored_spike_is_taken_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = SpoiltMixture({9: 30.0}).spoil(monkeypatch)
    found, log = train(tmp_path / "ignored", mixture, spike=Spike(sigma=20.0, window=4, action="ignore"))
    plain, _ = train(tmp_path / "plain", mixture)
    assert equal(found, plain)
    assert not any(e["skipped"] for e in log)
    assert [e["action"] for e in lines(tmp_path / "ignored" / EVENTS)] == ["ignore"]
    assert all(torch.isfinite(t).all() for t in found.values())
