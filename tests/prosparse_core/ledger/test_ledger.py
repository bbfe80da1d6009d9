"""What people see: runs, steps, results and every view, on a small filled ledger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ledger_fixture import (
    CORPORA,
    MODEL,
    NUM_LAYERS,
    THRESHOLDS,
    Home,
    ask,
    evaluation_facts,
    make_artifact,
    record_step,
    shared_home,
    start_run,
    variant_fact,
)

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.ledger import EXAMPLES, Ledger

# The names house rules fix: users and other programs query them.
TABLES = (
    "runs steps artifacts lineage variants train_metrics sparsity thresholds evaluations predictors speed published"
)
VIEWS = "leaderboard comparison matched_sparsity paper_gap threshold_tradeoff loss_curve speedup"
RESULTS = "run_id recipe model setting variant kind name corpus_or_task value unit stderr n conditions measured_at"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return shared_home(tmp_path_factory)


def test_importing_the_ledger_loads_neither_duckdb_nor_torch() -> None:
    code = (
        "import sys, prosparse_core.ledger; print(sorted({'duckdb', 'torch', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fixed_names_are_there(home: Home) -> None:
    names = {row[0] for row in ask(home, "SHOW TABLES")}
    assert set(TABLES.split()) | set(VIEWS.split()) | {"results"} <= names
    assert home.ledger.query("FROM results LIMIT 0").columns[: len(RESULTS.split())] == RESULTS.split()
    runs = home.ledger.query("FROM runs LIMIT 0").columns
    assert {"run_id", "recipe", "status", "started_at", "ended_at"} <= set(runs)
    steps = home.ledger.query("FROM steps LIMIT 0").columns
    assert {"run_id", "step", "stage", "status", "wall_s", "error"} <= set(steps)


def test_every_table_view_column_and_macro_has_a_comment(home: Home) -> None:
    for kind in ("tables", "views"):
        sql = f"SELECT {kind[:-1]}_name FROM duckdb_{kind}() WHERE NOT internal AND comment IS NULL"
        assert ask(home, sql) == []
    sql = "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal AND comment IS NULL"
    assert ask(home, sql) == []
    assert ask(home, "SELECT count(*) > 200 FROM duckdb_columns() WHERE NOT internal") == [(True,)]
    sql = "SELECT function_name FROM duckdb_functions() WHERE NOT internal AND function_type LIKE '%macro%'"
    assert {row[0] for row in ask(home, sql)} == {
        "before_thresholds", "benchmark_of", "by_share", "is_baseline", "lineage_of", "members_of", "paper_baseline",
        "paper_model", "t_quantile", "without_nulls",
    }  # fmt: skip
    assert ask(home, sql + " AND comment IS NULL") == []


def test_no_comment_is_left_over() -> None:
    """A line of columns.csv that no column uses is a typing error."""
    import csv

    import duckdb

    from prosparse_core.ledger import schema

    folder = Path(schema.__file__).parent
    with open(folder / "columns.csv", encoding="utf-8", newline="") as handle:
        written = [row["column"] for row in csv.DictReader(handle)]
    con = duckdb.connect()
    for name in schema._SQL:
        con.execute((folder / name).read_text(encoding="utf-8"))
    known = con.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal").fetchall()
    assert len(written) == len(set(written))
    assert set(written) <= {column for _, column in known} | {f"{table}.{column}" for table, column in known}


def test_runs_and_steps(home: Home) -> None:
    rows = ask(home, "SELECT run_id, status, ended_at IS NOT NULL, error, host, pid FROM runs ORDER BY run_id")
    message = "ProSparseError: stage 0, step 2: loss nan"
    assert rows == [
        (home.first_run, "done", True, None, "bench", 4242),
        (home.second_run, "done", True, None, "bench", 4242),
        (home.failed_run, "failed", True, message, "bench", 4242),
    ]
    counts = ask(home, "SELECT run_id, status, count(*) FROM steps GROUP BY ALL ORDER BY ALL")
    num_steps = len(home.artifacts) - 1
    assert counts == [
        (home.first_run, "done", num_steps),
        (home.second_run, "cached", num_steps - 2),
        (home.second_run, "done", 1),
        (home.failed_run, "cached", 1),
        (home.failed_run, "failed", 1),
    ]
    sql = "SELECT step, stage, error, hint, artifact, wall_s >= 0 FROM steps WHERE status = 'failed'"
    assert ask(home, sql) == [("stage", 0, message, "lower train.lr", None, True)]


def test_run_keeps_what_makes_it_repeatable(home: Home) -> None:
    [run] = home.ledger.query(f"FROM runs WHERE run_id = '{home.first_run}'").records()
    assert run["recipe_yaml"] == f"name: {MODEL}\n"
    assert run["overrides"] == ["train.lr=2e-4"]
    assert run["provenance"] == {"host": "bench", "pid": 4242, "python": "3.11"}


def test_running_run_and_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    step = ledger.start_step("r", step="stage", stage=2, label="stage 2", fingerprint="ab")
    assert ask(ledger, "SELECT status, ended_at, wall_s FROM runs") == [("running", None, None)]
    assert ask(ledger, "SELECT step_id, status, ended_at FROM steps") == [(step, "running", None)]
    ledger.end_run("r", "failed", "KeyboardInterrupt: terminated")
    assert ask(ledger, "SELECT status, error FROM steps") == [("failed", "the run ended before this step did")]
    ledger.end_run("r", "done")
    assert ask(ledger, "SELECT status, error FROM runs") == [("done", None)], "the later word counts"


def test_starting_a_run_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    start_run(ledger, "r")  # a retry after an error says the same again
    assert ask(ledger, "SELECT count(*) FROM runs") == [(1,)]
    with pytest.raises(BadInput, match="already a run 'r'"):
        start_run(ledger, "r", recipe_yaml="name: other\n")


def test_unknown_ids_are_errors(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for call in (
        lambda: ledger.end_run("nope", "done"),
        lambda: ledger.start_step("nope", step="stage", stage=0, label="s", fingerprint="f"),
        lambda: ledger.end_step("nope", status="failed"),
    ):
        with pytest.raises(ProSparseError, match="nope"):
            call()
    with pytest.raises(AssertionError):
        ledger.end_run("nope", "finished")


def test_a_reused_fact_shows_in_both_runs_and_is_stored_once(home: Home) -> None:
    where = (
        "kind = 'evaluation' AND setting = 'original' AND name = 'token_perplexity' AND corpus_or_task = 'python-code'"
    )
    rows = ask(home, f"SELECT run_id, value, n, measured_at, artifact FROM results WHERE {where} ORDER BY run_id")
    assert [row[0] for row in rows] == [home.first_run, home.second_run]
    assert rows[0][1:] == rows[1][1:]
    assert rows[0][1] == 6.4 + CORPORA.index("python-code")
    sql = (
        "SELECT count(*) FROM evaluations WHERE metric = 'token_perplexity' AND corpus = 'python-code' AND task IS NULL"
    )
    assert ask(home, sql) == [(4,)], "original, prosparse_star, and prosparse measured twice"


def test_a_run_does_not_see_what_it_did_not_use(home: Home) -> None:
    sql = "SELECT DISTINCT run_id FROM results WHERE kind = 'speed'"
    assert ask(home, sql) == [(home.first_run,)]
    sql = f"SELECT count(*) FROM results WHERE run_id = '{home.failed_run}'"
    assert ask(home, sql) == [(0,)]


def test_a_step_made_and_then_reused_in_one_run_counts_once(home: Home, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    base = make_artifact(tmp_path, "base_model", "base")
    fact = variant_fact("original", base, "original")
    made = make_artifact(tmp_path, "evaluate", "e", evaluation_facts(fact, 5.0, 0.1, 0.5, None))
    start_run(ledger, "r")
    record_step(ledger, "r", made)
    once = ask(ledger, "SELECT count(*) FROM results")
    record_step(ledger, "r", made, "cached")
    assert ask(ledger, "SELECT count(*) FROM results") == once


def test_results_hold_every_kind_with_units_and_conditions(home: Home) -> None:
    sql = f"SELECT kind, name, unit, count(*) FROM results WHERE run_id = '{home.first_run}' GROUP BY ALL ORDER BY ALL"
    num_corpora, num_variants = len(CORPORA), 3
    assert ask(home, sql) == [
        ("evaluation", "acc", "fraction", 2 * num_variants),
        ("evaluation", "acc_norm", "fraction", num_variants),
        ("evaluation", "byte_perplexity", "perplexity", num_corpora * num_variants),
        ("evaluation", "exact_match", "fraction", num_variants),
        ("evaluation", "token_perplexity", "perplexity", num_corpora * num_variants + 1),
        ("layer_sparsity", "layer_sparsity", "fraction", NUM_LAYERS * num_corpora * num_variants),
        ("predictor", "predicted_sparsity", "fraction", 2),
        ("predictor", "recall", "fraction", 2),
        ("predictor", "true_sparsity", "fraction", 2),
        ("sparsity", "chunk_sparsity", "fraction", num_corpora * num_variants),
        ("sparsity", "dead_frac", "fraction", num_corpora * num_variants),
        ("sparsity", "mean_abs_live", "activation", num_corpora * num_variants),
        ("sparsity", "mean_abs_x1", "activation", num_corpora * num_variants),
        ("sparsity", "sparsity", "fraction", num_corpora * num_variants),
        ("speed", "gbps", "GB/s", 8),
        ("speed", "p50_us", "us", 10),
        ("threshold", "sparsity", "fraction", len(THRESHOLDS) * (num_corpora + 1)),
        ("threshold", "token_perplexity", "perplexity", len(THRESHOLDS) * (num_corpora + 1)),
        ("training", "batch_sparsity", "fraction", 3),
        ("training", "lm_loss", "nats", 3),
        ("training", "tokens_per_s", "tokens/s", 3),
    ]
    [row] = home.ledger.query(
        "SELECT conditions, stderr, n FROM results WHERE name = 'acc' AND setting = 'prosparse_star' "
        f"AND corpus_or_task = 'piqa' AND run_id = '{home.first_run}'"
    ).records()
    conditions = {"num_fewshot": 0, "batch_size": 4, "dtype": "fp32", "harness_version": "0.4.13"}
    assert row == {"conditions": conditions, "stderr": 0.03, "n": 60}


def test_mean_sparsity_is_the_mean_over_layers(home: Home) -> None:
    sql = (
        "SELECT value, conditions->>'layers' FROM results WHERE kind = 'sparsity' AND name = 'sparsity' "
        f"AND setting = 'prosparse' AND corpus_or_task = 'package-docs' AND run_id = '{home.first_run}'"
    )
    layers = [0.83 + 0.01 + 0.02 * (layer - 1.5) for layer in range(NUM_LAYERS)]
    [(value, count)] = ask(home, sql)
    assert value == pytest.approx(sum(layers) / NUM_LAYERS, abs=1e-15)
    assert count == str(NUM_LAYERS)


def test_not_measured_is_a_row_without_a_value_and_with_the_reason(home: Home) -> None:
    sql = "SELECT value, conditions->>'note' FROM results WHERE corpus_or_task = 'gsm8k' AND setting = 'original'"
    assert set(ask(home, sql)) == {(None, "no network, no local copy")}
    sql = "SELECT DISTINCT not_measured, gsm8k FROM leaderboard"
    assert ask(home, sql) == [(["gsm8k: no network, no local copy"], None)]


@pytest.mark.parametrize(("question", "sql"), EXAMPLES, ids=[question for question, _ in EXAMPLES])
def test_every_example_answers(home: Home, question: str, sql: str) -> None:
    assert question[0].isupper()
    table = home.ledger.query(sql)
    assert len(table) > 0, "an example without an answer explains nothing"
    assert len(table.columns) == len(table.rows[0])


def test_every_view_can_be_read(home: Home) -> None:
    views = [view for (view,) in ask(home, "SELECT view_name FROM duckdb_views() WHERE NOT internal")]
    empty = {view for view in views if not len(home.ledger.query(f"FROM {view}"))}
    assert empty == {"paired", "variant_differences"}, "these need documents: test_ledger_differences.py fills them"


# Asking.


def test_query_on_an_empty_home(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.exists()
    with pytest.raises(BadInput, match="no ledger at") as caught:
        ledger.query("FROM runs")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == [], "asking writes nothing"


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEKT 1", "syntax error"),
        ("SELECT sparsit FROM leaderboard", 'Candidate bindings: "sparsity"'),
        ("FROM leaderbord", 'Did you mean "leaderboard"'),
        ("SELECT 'x'::INTEGER", "Could not convert"),
        ("", "no statement"),
        (" -- nothing\n", "no statement"),
        (";", "no statement"),
    ],
)
def test_a_wrong_query_is_bad_input_with_duckdbs_words(home: Home, sql: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        home.ledger.query(sql)
    assert caught.value.hint


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM evaluations",
        "INSERT INTO run_ends VALUES ('r', 'done', now()::TIMESTAMP, NULL)",
        "UPDATE speed SET p50_us = 1",
        "DROP VIEW leaderboard",
        "CREATE TABLE mine (a INTEGER)",
        "COPY runs TO 'runs.csv'",
        "ATTACH 'other.duckdb'",
        "FROM read_csv('/etc/passwd')",
        "SELECT 1; DROP TABLE speed",
    ],
)
def test_a_query_cannot_write_or_reach_other_files(home: Home, sql: str) -> None:
    before = home.ledger.path.read_bytes()
    with pytest.raises(BadInput) as caught:
        home.ledger.query(sql)
    assert caught.value.hint
    assert home.ledger.path.read_bytes() == before


def test_table_records_decode_json_only_where_the_type_is_json(home: Home) -> None:
    table = home.ledger.query(
        """SELECT '{"a": 1}'::JSON AS j, '{"a": 1}' AS text, NULL::JSON AS none, MAP {'k': 2} AS m"""
    )
    assert table.records() == [{"j": {"a": 1}, "text": '{"a": 1}', "none": None, "m": {"k": 2}}]
    assert list(table) == table.rows
    assert len(table) == 1


# Runs that died.


def test_mark_dead_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.mark_dead_runs(lambda run: False) == []
    for name, pid in (("alive", 1), ("dead", 2), ("ended", 3)):
        start_run(ledger, name, provenance={"host": "bench", "pid": pid, "process_started_at": 12.5})
    ledger.end_run("ended", "done")
    step = ledger.start_step("dead", step="stage", stage=1, label="stage 1", fingerprint="f")
    seen: list[dict[str, Any]] = []

    def is_alive(run: dict[str, Any]) -> bool:
        seen.append(run)
        return run["pid"] == 1

    assert ledger.mark_dead_runs(is_alive) == ["dead"]
    assert {run["run_id"] for run in seen} == {"alive", "dead"}
    assert {"run_id", "flow", "recipe", "model", "host", "pid", "started_at", "provenance"} == set(seen[0])
    assert seen[0]["provenance"]["process_started_at"] == 12.5
    assert ask(ledger, "SELECT run_id, status, error FROM runs ORDER BY run_id") == [
        ("alive", "running", None),
        ("dead", "failed", "process died"),
        ("ended", "done", None),
    ]
    sql = "SELECT step_id, status, error, hint IS NOT NULL FROM steps"
    assert ask(ledger, sql) == [(step, "failed", "process died", True)]
    assert ledger.mark_dead_runs(is_alive) == []
