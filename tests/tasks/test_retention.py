"""runtime.keep: last drops optimizer states nothing goes on from; a changed stage makes them again, in equal bits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import compare
from prosparse_core import settings
from prosparse_core.errors import ProSparseError
from prosparse_core.ledger import Ledger
from prosparse_core.recipe import parse
from prosparse_core.store import DROPPED, RECORD, Artifact, read_record, verify
from prosparse_core.variants import OPTIMIZER
from tasks.retention import drop_optimizers
from tasks.stage import train_stage
from tasks.step import Run

STAGES = [{"until_step": 1, "l1": 0}, {"until_step": 2, "l1": 0.1}, {"until_step": 4, "l1": 0.5, "ramp": "sine"}]


@pytest.fixture
def home(base: Any, tmp_path: Path) -> Any:
    """A home with the base's two artifacts, and not with what other tests made of them."""
    for artifact in (base.dense, base.corpora):
        shutil.copytree(artifact.path, tmp_path / artifact.path.relative_to(base.home))
    return tmp_path


def make_run(base: Any, home: Path, last_l1: float = 0.5, keep: str = "last") -> tuple[Run, Any]:
    stages = [*STAGES[:2], {**STAGES[2], "l1": last_l1}]
    train = {**base.recipe["train"], "stages": stages}
    return dataclasses.replace(base, home=home).run(train=train, runtime={"keep": keep})


def train(run: Run, base: Any) -> list[Artifact]:
    """The middle of ``flows.full``."""
    dense = run.store.find("base_model", "", base.dense.fingerprint)
    checkpoints = [dense]
    for index in range(len(run.recipe.train.stages)):
        made = train_stage(run, run.recipe.train, index, before=checkpoints[-1], corpora=base.corpora, dense=dense)
        checkpoints.append(made)
        drop_optimizers(run, checkpoints[:-1])
    return checkpoints[1:]


def has_state(stages: list[Artifact]) -> list[bool]:
    return [(stage.path / OPTIMIZER).exists() for stage in stages]


def outcomes(run: Run) -> list[tuple[str, str]]:
    return [(label.split(" ·")[0], outcome) for label, _, outcome in run.history]


def test_last_keeps_the_last_state_and_a_changed_stage_makes_the_others_again(base: Any, home: Path) -> None:
    run, _ = make_run(base, home)
    first = train(run, base)
    assert has_state(first) == [False, False, True]
    assert all(verify(stage.path) == [] for stage in first)
    assert (first[0].path / "model" / "model.safetensors").exists()
    assert "runtime.keep=last" in json.loads((first[0].path / DROPPED).read_text())[OPTIMIZER]["reason"]
    sql = "SELECT artifact FROM dropped ORDER BY happened_at"
    assert {row[0] for row in Ledger(home).query(sql).rows} == {first[0].digest, first[1].digest}
    sql = f"SELECT dropped FROM lineage_of('{first[2].digest}') WHERE step = 'stage' ORDER BY depth"
    assert [row[0] for row in Ledger(home).query(sql).rows] == [None, OPTIMIZER, OPTIMIZER]

    run, _ = make_run(base, home)
    assert [s.digest for s in train(run, base)] == [s.digest for s in first]
    assert outcomes(run) == [("stage 0", "cached"), ("stage 1", "cached"), ("stage 2", "cached")]

    plan, _ = make_run(base, home, last_l1=0.7)
    plan.planning = True
    train(plan, base)
    assert outcomes(plan) == [("stage 0", "would run"), ("stage 1", "would run"), ("stage 2", "would run")]
    assert "optimizer.pt was dropped" in plan.reasons[plan.history[0][0]]
    assert has_state(first) == [False, False, True], "a plan changes nothing"

    run, seen = make_run(base, home, last_l1=0.7)
    changed = train(run, base)
    assert [s.digest for s in changed[:2]] == [s.digest for s in first[:2]], "trained again to the same bits"
    assert changed[2].digest != first[2].digest
    assert outcomes(run) == [
        *(("stage 0", "cached"), ("stage 1", "cached"), ("stage 0", "done"), ("stage 1", "done"), ("stage 2", "done"))
    ]
    assert sum("was dropped (runtime.keep=last)" in note for note in seen.notes) == 2
    assert has_state([*changed, first[2]]) == [False, False, True, True]
    assert Ledger(home).query("SELECT count(*) FROM retention WHERE event = 'made again'").rows == [(2,)]
    assert Ledger(home).query("SELECT count(*) FROM dropped").rows == [(2,)]
    rebuilt = Ledger(home)
    rebuilt.rebuild(home / "store")
    assert rebuilt.query("SELECT count(*) FROM dropped").rows == [(2,)]


def test_all_keeps_every_state_and_retrains_the_changed_stage_alone(base: Any, home: Path) -> None:
    run, _ = make_run(base, home, keep="all")
    assert has_state(train(run, base)) == [True, True, True]
    run, _ = make_run(base, home, last_l1=0.7, keep="all")
    train(run, base)
    assert outcomes(run) == [("stage 0", "cached"), ("stage 1", "cached"), ("stage 2", "done")]
    assert Ledger(home).query("SELECT count(*) FROM retention").rows == [(0,)]


def test_a_stage_that_comes_out_otherwise_is_said_and_the_next_run_goes_on_from_it(base: Any, home: Path) -> None:
    run, _ = make_run(base, home)
    stages = train(run, base)
    record = read_record(stages[0].path)  # as another machine would have written it: other bits, another digest
    (stages[0].path / RECORD).write_text(json.dumps({**record, "digest": "0" * 64}))
    for path in (home / "store" / "stage").iterdir():
        if path != stages[0].path:
            shutil.rmtree(path)
    run, _ = make_run(base, home, last_l1=0.7)
    with pytest.raises(ProSparseError, match="came out otherwise than before"):
        train(run, base)
    run, _ = make_run(base, home, last_l1=0.7)
    train(run, base)
    assert outcomes(run) == [("stage 0", "cached"), ("stage 1", "done"), ("stage 2", "done")]


def test_a_comparison_keeps_what_a_later_row_goes_on_from(base: Any, home: Path) -> None:
    run, _ = make_run(base, home)
    names = ["vanilla_relu", "prosparse_star", "fixed_l1"]
    recipe = parse({**run.recipe.model_dump(mode="json"), "compare": {"settings": names, "thresholds": False}})
    rows = settings.rows(recipe)
    run.recipe = recipe
    dense = run.store.find("base_model", "", base.dense.fingerprint)
    found = []
    for number, row in enumerate(rows):
        needed = settings.continued(rows[number + 1 :], recipe.seed)
        compare.trained(run, row, dense, base.corpora, needed)
        labels = {label.split(" ·")[0]: artifact for label, artifact, _ in run.history if artifact}
        found.append((labels["stage 0"].path / OPTIMIZER).exists())
    assert found == [True, True, False], "stage 0 is common to all: the last row that goes on from it lets it go"
    assert [outcome for _, outcome in outcomes(run)].count("done") == 1 + 1 + 2 + 1
    shared = settings.training_of(rows, recipe.seed)
    assert (shared.num_stages, shared.num_last) == (5, 3)
    assert len(list((home / "store" / "stage").glob(f"*/{OPTIMIZER}"))) == shared.num_last
