"""The one cache: same fingerprint no work, failures recorded, forced steps run again, plans touch nothing."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.ledger import Ledger
from prosparse_core.progress import Silent
from prosparse_core.store import Artifact
from tasks.step import Finished, Run, Work


class Seen:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Silent]:
        yield Silent()

    def outcome(self, label: str, outcome: str, detail: str = "") -> None:
        self.outcomes.append((label, outcome))


def open_run(home: Path, **changes: Any) -> Run:
    recipe = recipes.load("tiny")
    ledger = Ledger(home)
    run_id = f"run-{len(list(home.glob('started*')))}"
    (home / f"started-{run_id}").touch()
    ledger.start_run(
        run_id=run_id, flow="prosparse", recipe="tiny", recipe_yaml="", overrides=[], model="m", provenance={"pid": 1}
    )
    return Run(recipe=recipe, home=home, run_id=run_id, ledger=ledger, watcher=Seen(), **changes)


def body(text: str, ran: list[str]) -> Any:
    def build(work: Work) -> None:
        ran.append(text)
        (work.folder / "result.txt").write_text(text, encoding="utf-8")
        work.meta["text"] = text

    return build


def make(run: Run, ran: list[str], text: str = "a", name: str = "mixture", **changes: Any) -> Artifact:
    given = {"version": 1, "config": {"text": text}, "inputs": {}, **changes}
    return run.step(name, f"{name} · {text}", body(text, ran), **given)


def steps(run: Run) -> list[tuple[str, str]]:
    return [tuple(r) for r in run.ledger.query("SELECT step, status FROM steps ORDER BY started_at, step_id").rows]


def test_the_same_fingerprint_is_no_work(tmp_path: Path) -> None:
    ran: list[str] = []
    first = make(open_run(tmp_path), ran)
    again = open_run(tmp_path)
    second = make(again, ran)
    assert ran == ["a"]
    assert first == second
    assert second.meta() == {"text": "a"}
    assert again.watcher.outcomes == [("mixture · a", "cached")]  # type: ignore[attr-defined]
    assert sorted(steps(again)) == [("mixture", "cached"), ("mixture", "done")]


@pytest.mark.parametrize(
    "changes", [{"text": "b"}, {"version": 2}, {"inputs": {"x": Artifact("s", "l", "f" * 64, "d" * 64, Path("."))}}]
)
def test_whatever_decides_the_result_makes_it_another_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    ran: list[str] = []
    run = open_run(tmp_path)
    make(run, ran)
    make(run, ran, **changes)
    assert len(ran) == 2


def test_a_failure_is_recorded_with_its_way_out_and_leaves_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def fail(work: Work) -> None:
        (work.folder / "half.txt").write_text("half", encoding="utf-8")
        raise BadInput("value 3 is too much", hint="use 2")

    with pytest.raises(BadInput):
        run.step("mixture", "mixture", fail, version=1, config={}, inputs={})
    rows = run.ledger.query("SELECT status, error, hint FROM steps").rows
    assert [tuple(r) for r in rows] == [("failed", "BadInput: value 3 is too much", "use 2")]
    assert not list((run.store.root / "mixture").glob("*")) if (run.store.root / "mixture").exists() else True


def test_an_interrupted_step_finds_what_it_left(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    found: list[bool] = []

    def build(work: Work) -> None:
        found.append((work.folder / "half.txt").exists())
        (work.folder / "half.txt").write_text("half", encoding="utf-8")
        if len(found) == 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.step("mixture", "mixture", build, version=1, config={}, inputs={})
    run.step("mixture", "mixture", build, version=1, config={}, inputs={})
    assert found == [False, True]


def test_a_forced_step_runs_again(tmp_path: Path) -> None:
    ran: list[str] = []
    make(open_run(tmp_path), ran)
    make(open_run(tmp_path, force=frozenset({"mixture"})), ran)
    assert ran == ["a", "a"]


def test_until_lets_every_step_of_that_name_run(tmp_path: Path) -> None:
    ran: list[str] = []
    run = open_run(tmp_path, until="stage")
    make(run, ran, "0", name="stage")
    make(run, ran, "1", name="stage")
    with pytest.raises(Finished):
        make(run, ran, "2", name="calibrate")
    assert ran == ["0", "1"]


def test_a_plan_runs_nothing_and_says_why(tmp_path: Path) -> None:
    ran: list[str] = []
    make(open_run(tmp_path), ran)
    before = sorted(tmp_path.rglob("*"))
    plan = open_run(tmp_path, planning=True)
    (tmp_path / "started-run-1").unlink()
    cached = make(plan, ran)
    changed = make(plan, ran, "b")
    waiting = make(plan, ran, "c", name="stage", inputs={"before": changed})
    assert ran == ["a"]
    assert cached.digest
    assert changed.digest is None
    assert waiting.digest is None
    assert [outcome for _, _, outcome in plan.history] == ["cached", "would run", "would run"]
    assert 'config.text: "a" -> "b"' in plan.reasons["mixture · b"]
    assert plan.reasons["stage · c"] == "its inputs are not built yet"
    assert [p for p in sorted(tmp_path.rglob("*")) if "store" in p.parts] == [p for p in before if "store" in p.parts]


def test_a_full_disk_is_an_environment_problem(tmp_path: Path) -> None:
    def fill(work: Work) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = open_run(tmp_path)
    with pytest.raises(EnvironmentProblem, match="is full") as caught:
        run.step("mixture", "mixture", fill, version=1, config={}, inputs={})
    assert "last checkpoint" in (caught.value.hint or "")


def test_too_little_room_is_said_before_the_body_runs(tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(EnvironmentProblem, match="GiB"):
        make(open_run(tmp_path), ran, needs_bytes=1 << 60)
    assert ran == []


def test_facts_reach_the_ledger(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def build(work: Work) -> None:
        work.fact("variants", variant="v@1", model="m", setting="original", activation="original", tokens_seen=0)
        work.fact("evaluations", variant="v@1", task="t", corpus="c", metric="token_perplexity", value=4.5, n=10)

    run.step("evaluate", "evaluate", build, version=1, config={}, inputs={})
    rows = run.ledger.query("SELECT setting, corpus_or_task, name, value FROM results WHERE kind = 'evaluation'").rows
    assert [tuple(r) for r in rows] == [("original", "t", "token_perplexity", 4.5)]
