"""From step folders to rows: what is refused and where it says so, what is tolerated aloud, and rebuilding."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_fixture import (
    FIRST_TIME,
    SCORE,
    VARIANT,
    Home,
    ask,
    evaluation_facts,
    make_artifact,
    record_step,
    shared_home,
    start_run,
    threshold_facts,
    training_log,
    variant_fact,
)

from prosparse_core.errors import ProSparseError
from prosparse_core.ledger import Ledger
from prosparse_core.ledger.ingest import TABLES
from prosparse_core.store import Artifact

LAYER = {"table": "sparsity", "variant": "v", "corpus": "c", "layer": 0, "num_tokens": 10, "sparsity": 0.5}


def record(home: Path, facts: list[dict[str, Any]] | str, log: str | None = None) -> Ledger:
    """Record one artifact with these facts (raw text as it is) and this training log."""
    made = make_artifact(
        home, "evaluate", "e", facts if isinstance(facts, list) else [], log=[] if log is not None else None
    )
    if isinstance(facts, str):
        (made.path / "facts.jsonl").write_text(facts, encoding="utf-8")
    if log is not None:
        (made.path / "log.jsonl").write_text(log, encoding="utf-8")
    ledger = Ledger(home)
    ledger.record_artifact(made.path)
    return ledger


@pytest.mark.parametrize(
    ("facts", "line", "says", "hint"),
    [
        ([VARIANT, {**SCORE, "table": "evaluation"}], 2, "unknown table 'evaluation'", "'evaluations'"),
        ([VARIANT, {**SCORE, "table": "runs"}], 2, "unknown table 'runs'", "did you mean"),
        ([{k: v for k, v in VARIANT.items() if k != "table"}], 1, "unknown table None", "variants"),
        ([VARIANT, SCORE, {**SCORE, "metrics": 1}], 3, "evaluations has no column 'metrics'", "'metric'"),
        ([VARIANT, {**SCORE, "artifact": "x"}], 2, "evaluations has no column 'artifact'", None),
        ([VARIANT, {k: v for k, v in SCORE.items() if k != "metric"}], 2, "evaluations.metric is required", None),
        ([VARIANT, {**LAYER, "sparsity": None}], 2, "sparsity.sparsity is required", None),
        ([VARIANT, {**SCORE, "value": "0.5"}], 2, "evaluations.value is a DOUBLE, not '0.5'", None),
        ([VARIANT, {**SCORE, "value": True}], 2, "evaluations.value is a DOUBLE, not True", None),
        ([VARIANT, {**SCORE, "n": 1.5}], 2, "evaluations.n is a BIGINT, not 1.5", None),
        ([VARIANT, {**SCORE, "higher_is_better": 1}], 2, "higher_is_better is a BOOLEAN, not 1", None),
        ([VARIANT, {**SCORE, "task": 3}], 2, "evaluations.task is a VARCHAR, not 3", None),
        ([VARIANT, LAYER, {**LAYER, "sparsity": 0.6}], 3, "the same sparsity row as", None),
        ([VARIANT, {**VARIANT, "model": "other"}], 2, "the same variants row as", None),
        ([VARIANT, {**SCORE, "variant": "w"}], 2, "measures variant 'w', which nothing has described", "variants"),
    ],
)
def test_a_fact_that_fits_nowhere_names_file_and_line(
    tmp_path: Path, facts: list[dict[str, Any]], line: int, says: str, hint: str | None
) -> None:
    with pytest.raises(ProSparseError) as caught:
        record(tmp_path, facts)
    assert f"facts.jsonl:{line}: " in str(caught.value)
    assert says in str(caught.value)
    if hint:
        assert caught.value.hint
        assert hint in caught.value.hint
    counts = ask(Ledger(tmp_path), "SELECT (SELECT count(*) FROM artifacts), (SELECT count(*) FROM variants)")
    assert counts == [(0, 0)], "nothing of the folder is recorded"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{\n", "facts.jsonl:1: not valid JSON"),
        ("[1]\n", "facts.jsonl:1: a fact is an object"),
        ('\n{"a', "facts.jsonl:2: "),
    ],
)
def test_facts_that_are_no_json(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ProSparseError, match=says):
        record(tmp_path, text)


@pytest.mark.parametrize(
    "fact",
    [{**LAYER, "sparsity": 1.5}, {**LAYER, "layer": -1}, {**SCORE, "value": None}, {**SCORE, "task": None}],
)
def test_a_fact_that_breaks_a_rule_is_refused(tmp_path: Path, fact: dict[str, Any]) -> None:
    """Sparsity outside 0..1, the mean stored as layer -1, n/a without a reason, a score of nothing."""
    with pytest.raises(ProSparseError, match=r"facts.jsonl: a \w+ row breaks a rule: .*CHECK"):
        record(tmp_path, [VARIANT, fact])
    assert ask(Ledger(tmp_path), "SELECT count(*) FROM artifacts") == [(0,)]


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    ledger = record(tmp_path, [VARIANT, {**SCORE, "stderr": math.nan, "value": math.inf, "note": "overflow"}])
    assert ask(ledger, "SELECT value, stderr, note FROM evaluations") == [(None, None, "overflow")]


def test_whole_floats_are_integers_and_integers_are_floats(tmp_path: Path) -> None:
    ledger = record(tmp_path, [VARIANT, {**SCORE, "n": 60.0, "value": 1}])
    assert ask(ledger, "SELECT n, value, typeof(n), typeof(value) FROM evaluations") == [(60, 1.0, "BIGINT", "DOUBLE")]


def test_recording_twice_changes_nothing(tmp_path: Path) -> None:
    made = make_artifact(tmp_path, "evaluate", "e", [VARIANT, SCORE])
    ledger = Ledger(tmp_path)
    ledger.record_artifact(made.path)
    before = ledger.path.stat()
    ledger.record_artifact(made.path)
    after = ledger.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "and publishes nothing"
    assert ask(ledger, "SELECT count(*) FROM evaluations") == [(1,)]


def test_equal_content_of_two_fingerprints_is_measured_once(tmp_path: Path) -> None:
    """Two recipes that differ in something without effect give the same files: one measurement, two artifacts."""
    one = make_artifact(tmp_path, "evaluate", "e", [VARIANT, SCORE])
    folder = tmp_path / "store" / "evaluate" / "copy"
    shutil.copytree(one.path, folder)
    record_file = folder / "artifact.json"
    text = json.loads(record_file.read_text())
    record_file.write_text(json.dumps({**text, "fingerprint": "e" * 64}))
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    record_step(ledger, "r", one)
    ledger.record_artifact(folder)
    assert ask(ledger, "SELECT count(*), count(DISTINCT digest) FROM artifacts") == [(2, 1)]
    assert ask(ledger, "SELECT count(*) FROM results") == [(1,)]


def test_a_variant_described_before_need_not_be_described_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    record_step(ledger, "r", make_artifact(tmp_path, "evaluate", "first", [{**VARIANT, "tokens_seen": 7}, SCORE]))
    record_step(ledger, "r", make_artifact(tmp_path, "predictor", "second", [{**LAYER, "corpus": "other"}]))
    assert ask(ledger, "SELECT DISTINCT setting FROM results") == [("prosparse",)]
    assert ask(ledger, "SELECT variant, tokens_seen FROM variants") == [("v", 7)]


def test_one_variant_under_two_model_names(tmp_path: Path) -> None:
    """The same weights measured for two recipes that call the model differently."""
    ledger = Ledger(tmp_path)
    for name, value in (("one", 0.5), ("two", 0.6)):
        facts = [{**VARIANT, "model": name}, {**SCORE, "value": value}]
        start_run(ledger, name, model=name)
        record_step(ledger, name, make_artifact(tmp_path, "evaluate", name, facts))
    sql = "SELECT run_id, model, accuracy FROM leaderboard ORDER BY run_id"
    assert ask(ledger, sql) == [("one", "one", 0.5), ("two", "two", 0.6)]


# The training log.


def as_text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_torn_last_line_of_the_log_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = as_text(training_log(0, 1, 5, 0.1))
    with caplog.at_level(logging.WARNING, "prosparse.ledger"):
        ledger = record(tmp_path, [], log=text[:-40])
    assert ask(ledger, "SELECT list(step ORDER BY step) FROM train_metrics") == [([1, 2, 3, 4],)]
    assert "log.jsonl:5: torn line" in caplog.text


def test_a_line_torn_in_the_middle_by_a_kill_and_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = as_text(training_log(0, 1, 4, 0.1)).splitlines()
    text = "\n".join([lines[0], lines[1][:30] + lines[1], lines[2], lines[3]]) + "\n"
    with caplog.at_level(logging.WARNING, "prosparse.ledger"):
        ledger = record(tmp_path, [], log=text)
    assert ask(ledger, "SELECT list(step ORDER BY step) FROM train_metrics") == [([1, 3, 4],)]
    assert "log.jsonl:2: torn line" in caplog.text


def test_nul_bytes_after_a_power_cut(tmp_path: Path) -> None:
    ledger = record(tmp_path, [], log=as_text(training_log(0, 1, 2, 0.1)) + "\0" * 50)
    assert ask(ledger, "SELECT count(*) FROM train_metrics") == [(2,)]


def test_an_unknown_column_of_the_log_is_an_error(tmp_path: Path) -> None:
    lines = training_log(0, 1, 2, 0.1)
    lines[1]["loss_lm"] = 1.0
    with pytest.raises(ProSparseError, match=r"log.jsonl:2: train_metrics has no column 'loss_lm'") as caught:
        record(tmp_path, [], log=as_text(lines))
    assert caught.value.hint == "did you mean 'lm_loss'?"


def test_a_diverged_step_has_no_loss(tmp_path: Path) -> None:
    lines = training_log(0, 1, 2, 0.1)
    lines[1]["lm_loss"] = math.nan
    ledger = record(tmp_path, [], log=as_text(lines))
    assert ask(ledger, "SELECT lm_loss FROM train_metrics ORDER BY step") == [(3.9,), (None,)]


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), finite, finite), min_size=1, max_size=30))
def test_the_last_row_of_a_step_counts_and_numbers_stay_exact(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, int, float, float]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    lines = [{"stage": stage, "step": step, "lm_loss": loss, "lr": lr} for stage, step, loss, lr in entries]
    ledger = record(home, [], log=as_text(lines))
    expected = {(stage, step): (loss, lr) for stage, step, loss, lr in entries}
    found = {
        (stage, step): (loss, lr)
        for stage, step, loss, lr in ask(ledger, "SELECT stage, step, lm_loss, lr FROM train_metrics")
    }
    assert found == expected
    assert len(ask(ledger, "FROM train_metrics")) == len(expected)


def test_a_long_log_is_one_bulk_insert(tmp_path: Path) -> None:
    made = make_artifact(tmp_path, "stage", "stage 0", log=training_log(0, 1, 20_000, 0.1))
    ledger = Ledger(tmp_path)
    ledger.record_artifact(made.path)
    assert ask(ledger, "SELECT count(*), max(step) FROM train_metrics") == [(20_000, 20_000)]
    assert sorted(p.name for p in (tmp_path / ".ledger").iterdir()) == ["lock", "private.duckdb", "published.json"]


# Records.


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"digest": "d"}'])
def test_a_broken_record_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    made = make_artifact(tmp_path, "evaluate", "e")
    (made.path / "artifact.json").write_text(text)
    with pytest.raises(ProSparseError, match=r"artifact\.json") as caught:
        Ledger(tmp_path).record_artifact(made.path)
    assert str(made.path) in str(caught.value.hint)


def test_an_artifact_outside_the_home_keeps_its_full_path(tmp_path: Path) -> None:
    made = make_artifact(tmp_path / "elsewhere", "evaluate", "e")
    ledger = Ledger(tmp_path / "home")
    ledger.record_artifact(made.path)
    assert ask(ledger, "SELECT path, created_at FROM artifacts") == [(str(made.path), FIRST_TIME.replace(tzinfo=None))]


# Rebuilding.


def everything(ledger: Ledger) -> dict[str, list[Any]]:
    """Every row of every table and view, as a set, without what may differ between two ledgers of the same facts."""
    names = [row[0] for row in ask(ledger, "SHOW TABLES") if row[0] != "schema_version"]
    return {name: sorted(map(repr, ask(ledger, f'FROM "{name}"'))) for name in names}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return shared_home(tmp_path_factory)


def copy_of(home: Home, target: Path) -> tuple[Ledger, int]:
    """The ledger of a copy of a home folder, and how many artifacts its store has."""
    shutil.copytree(home.path, target / "copy")
    return Ledger(target / "copy"), len(home.artifacts)


def schema_tables(names: Iterable[str]) -> list[str]:
    """The tables that come from the store."""
    return sorted(set(names) & {*TABLES.values(), "artifacts", "lineage"})


def test_rebuilding_gives_the_same_ledger(filled: Home, tmp_path: Path) -> None:
    ledger, num_artifacts = copy_of(filled, tmp_path)
    before = everything(ledger)
    assert ledger.rebuild(ledger.home / "store") == num_artifacts
    assert everything(ledger) == before


def test_rebuilding_from_the_store_alone(filled: Home, tmp_path: Path) -> None:
    ledger, num_artifacts = copy_of(filled, tmp_path)
    before = everything(ledger)
    shutil.rmtree(ledger.home / ".ledger")
    ledger.path.unlink()
    assert not ledger.exists()
    assert ledger.rebuild(ledger.home / "store") == num_artifacts
    after = everything(ledger)
    for name in (*schema_tables(after), "variants", "facts"):
        assert after[name] == before[name], name
    assert after["runs"] == []
    settings_found = ask(ledger, "SELECT DISTINCT setting FROM leaderboard WHERE run_id IS NULL ORDER BY 1")
    assert settings_found == [("original",), ("prosparse",), ("prosparse_star",)], "facts without runs are still shown"


def test_rebuilding_leaves_out_what_is_broken_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = make_artifact(tmp_path, "evaluate", "good", [VARIANT, SCORE])
    bad = make_artifact(tmp_path, "evaluate", "bad", [{**SCORE, "task": "other", "nonsense": 1}])
    broken = make_artifact(tmp_path, "evaluate", "broken")
    (broken.path / "artifact.json").write_text("{")
    unfinished = tmp_path / "store" / ".work" / "evaluate-x"
    shutil.copytree(good.path, unfinished)
    ledger = Ledger(tmp_path)
    with caplog.at_level(logging.WARNING, "prosparse.ledger"):
        assert ledger.rebuild(tmp_path / "store") == 1
    assert ask(ledger, "SELECT label FROM artifacts") == [("good",)]
    assert str(bad.path) in caplog.text
    assert str(broken.path) in caplog.text
    assert ".work" not in caplog.text


def test_rebuilding_an_empty_home(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.rebuild(tmp_path / "store") == 0
    assert ask(ledger, "SELECT count(*) > 400 FROM published") == [(True,)]


def test_facts_of_the_fixture_are_what_steps_write() -> None:
    """The fixture stands for the real steps: one description per variant and no fact without it."""
    base = Artifact("base_model", "b", "f" * 64, "d" * 64, None)
    variant = variant_fact("original", base, "original")
    for facts in (evaluation_facts(variant, 5.0, 0.5, 0.5, None), [variant, *threshold_facts(variant)]):
        assert [fact["table"] for fact in facts].count("variants") == 1
        assert {fact["variant"] for fact in facts} == {variant["variant"]}


def test_what_a_stage_wrote_down_while_it_trained(tmp_path: Path) -> None:
    steps = [
        {**line, "skipped": "not finite: loss nan" if line["step"] == 3 else None}
        for line in training_log(0, 1, 4, 0.1)
    ]
    looks = [
        {"stage": 0, "step": 2, "corpus": corpus, "num_tokens": n, "lm_loss": loss, "sparsity": sparsity}
        for corpus, n, loss, sparsity in (("code", 10, 9.0, 0.9), ("code", 10, 1.0, 0.5), ("prose", 30, 2.0, 0.7))
    ]
    events = [
        {
            "stage": 0,
            "step": 3,
            "action": "rollback",
            "reason": "not finite",
            "lm_loss": math.nan,
            "grad_norm": 1.0,
            "first_step": 2,
        }
    ]
    writes = [{"stage": 0, "step": s, "bytes": 100, "blocking_s": 0.5, "write_s": 2.0} for s in (2, 4, 2)]
    made = make_artifact(
        tmp_path,
        "stage",
        "stage 0",
        log=steps,
        logs={"held_out.jsonl": looks, "events.jsonl": events, "checkpoints.jsonl": writes},
    )
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    record_step(ledger, "r", made)
    assert ask(ledger, "SELECT step, skipped FROM loss_curve WHERE skipped IS NOT NULL") == [
        (3, "not finite: loss nan")
    ]
    curve = ask(ledger, "SELECT corpus, num_tokens, perplexity, sparsity, tokens FROM held_out_curve ORDER BY corpus")
    tokens = steps[1]["tokens"]
    assert curve == [
        ("code", 10, pytest.approx(math.e), 0.5, tokens),
        ("mixed", 40, pytest.approx(math.exp(70 / 40)), pytest.approx(0.65), tokens),
        ("prose", 30, pytest.approx(math.exp(2)), 0.7, tokens),
    ]
    assert ask(ledger, "SELECT step, action, lm_loss, first_step FROM train_events") == [(3, "rollback", None, 2)]
    wall = sum(line["wall_s"] for line in steps)
    assert ask(ledger, "SELECT num_checkpoints, bytes, blocking_s, write_s, blocking_share FROM checkpoint_cost") == [
        (2, 100, 1.0, 4.0, pytest.approx(1.0 / (wall + 1.0)))
    ]


def test_a_stages_other_logs_are_no_part_of_its_digest(tmp_path: Path) -> None:
    """Looks at held-out text and checkpoints are the runtime's: a stage is the same with them and without."""
    looks = [{"stage": 0, "step": 2, "corpus": "code", "num_tokens": 3, "lm_loss": 1.0, "sparsity": 0.5}]
    plain = make_artifact(tmp_path / "plain", "stage", "s", log=[])
    watched = make_artifact(tmp_path / "watched", "stage", "s", log=[], logs={"held_out.jsonl": looks})
    assert plain.digest == watched.digest
