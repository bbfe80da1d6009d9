"""What people see: runs, steps, results and every view, on a small filled ledger."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ledger_fixture import (
    CHOSEN,
    CORPORA,
    MODEL,
    NUM_LAYERS,
    THRESHOLDS,
    Home,
    build_home,
    evaluation_facts,
    make_artifact,
    record_step,
    speed_facts,
    start_run,
    variant_fact,
)

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.ledger import EXAMPLES, Ledger

# The names house rules fix: users and other programs query them.
TABLES = (
    "runs steps artifacts lineage variants train_metrics sparsity thresholds evaluations predictors speed published"
)
VIEWS = "leaderboard paper_gap threshold_tradeoff loss_curve speedup"
RESULTS = "run_id recipe model setting variant kind name corpus_or_task value unit stderr n conditions measured_at"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return build_home(tmp_path_factory.mktemp("home"))


def ask(home: Home | Ledger, sql: str) -> list[tuple[Any, ...]]:
    return (home.ledger if isinstance(home, Home) else home).query(sql).rows


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
    assert {row[0] for row in ask(home, sql)} == {"lineage_of", "paper_model", "without_nulls"}
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
        ("sparsity", "dead_frac", "fraction", num_corpora * num_variants),
        ("sparsity", "mean_abs_x1", "activation", num_corpora * num_variants),
        ("sparsity", "sparsity", "fraction", num_corpora * num_variants),
        ("speed", "gbps", "GB/s", 6),
        ("speed", "p50_us", "us", 7),
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


def test_leaderboard(home: Home) -> None:
    rows = home.ledger.query(f"FROM leaderboard WHERE run_id = '{home.first_run}' ORDER BY sparsity").records()
    assert [row["setting"] for row in rows] == ["original", "prosparse_star", "prosparse"]
    last = rows[-1]
    assert last["recipe"] == last["model"] == MODEL
    assert last["perplexity_by_corpus"] == {c: 7.1 + i for i, c in enumerate(CORPORA)}
    tokens = [1000, 2000, 3000]
    nats = sum(n * math.log(7.1 + i) for i, n in enumerate(tokens))
    assert last["perplexity"] == pytest.approx(math.exp(nats / sum(tokens)), rel=1e-14)
    assert last["sparsity"] == pytest.approx(0.84, abs=1e-12)
    assert list(last["sparsity_by_corpus"]) == list(CORPORA)
    assert last["threshold"] == CHOSEN
    assert last["accuracy"] == pytest.approx((0.54 + 0.64) / 2)
    assert (last["num_benchmarks"], last["partial"], last["commonsense"]) == (2, False, 0.54)
    assert last["average"] is None, "four of the paper's seven columns are missing"
    assert rows[0]["threshold"] is None
    assert rows[1]["threshold"] == 0.0


def test_leaderboard_shows_each_runs_own_measurement(home: Home) -> None:
    sql = "SELECT run_id, perplexity_by_corpus['instruction'], partial FROM leaderboard WHERE setting = 'prosparse'"
    assert sorted(ask(home, sql)) == [(home.first_run, 7.1, False), (home.second_run, 7.3, True)]


def test_leaderboard_keeps_calibration_files_out(home: Home) -> None:
    sql = "SELECT DISTINCT perplexity_by_corpus['python-code'] FROM leaderboard WHERE setting = 'original'"
    assert ask(home, sql) == [(8.4,)], "5.5 was measured on the files thresholds are chosen on"


def scores(home: Path, rows: list[dict[str, Any]], model: str = "Llama-2-7b-hf", setting: str = "prosparse") -> Ledger:
    """A ledger with one run that measured ``rows`` of one variant."""
    ledger = Ledger(home)
    variant = {"table": "variants", "variant": "v", "model": model, "setting": setting}
    facts = [{"table": "evaluations", "variant": "v", "higher_is_better": True, "n": 10, **row} for row in rows]
    made = make_artifact(home, "evaluate", "e", [variant, *facts])
    start_run(ledger, "r", model=model)
    record_step(ledger, "r", made)
    return ledger


def test_benchmarks_group_as_the_paper_does(tmp_path: Path) -> None:
    rows = [
        {"task": "humaneval", "metric": "pass@1,create_test", "value": 0.2},
        {"task": "mbpp", "metric": "pass_at_1,none", "value": 0.4},
        {"task": "social_iqa", "metric": "acc,none", "value": 0.4},
        {"task": "copa", "metric": "acc,none", "value": 0.8},
        {"task": "boolq", "metric": "acc,none", "value": 0.6},
        {"task": "lambada_openai", "metric": "acc,none", "value": 0.5},
        {"task": "lambada_openai", "metric": "perplexity,none", "value": 9.0, "higher_is_better": False},
        {"task": "tydiqa_goldp_en", "metric": "f1,none", "value": 0.3},
        {"task": "tydiqa_goldp_ko", "metric": "f1,none", "value": 0.5},
        {"task": "gsm8k", "metric": "exact_match,strict-match", "value": 0.10},
        {"task": "gsm8k", "metric": "exact_match,flexible-extract", "value": 0.90},
        {"task": "mmlu", "metric": "acc,none", "value": 0.45},
        {"task": "mmlu_anatomy", "metric": "acc,none", "value": 0.99},
        {"task": "mmlu_pro", "metric": "exact_match,custom-extract", "value": 0.01},
        {"task": "bbh_fewshot_navigate", "metric": "exact_match,none", "value": 0.2},
        {"task": "bbh_fewshot_snarks", "metric": "exact_match,none", "value": 0.4},
        {"task": "agieval_en", "metric": "acc,none", "value": 0.25},
        {"task": "agieval_sat_en", "metric": "acc,none", "value": 0.75},
    ]
    ledger = scores(tmp_path, rows)
    [row] = ledger.query("FROM leaderboard").records()
    expected = {
        "code": 0.3,
        "commonsense": 0.6,
        "reading": 0.5,
        "gsm8k": 0.1,
        "mmlu": 0.45,
        "bbh": 0.3,
        "agieval": 0.25,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["average"] == pytest.approx(sum(expected.values()) / 7)
    assert row["num_benchmarks"] == 12
    sql = "SELECT metric, round(ours, 9), paper, round(gap, 9) FROM paper_gap WHERE run_id = 'r' AND metric IN "
    rows_found = ask(ledger, sql + "('average_pct', 'humaneval_pct', 'gsm8k_pct') ORDER BY metric")
    average = 100 * sum(expected.values()) / 7
    assert rows_found == [
        ("average_pct", pytest.approx(average), 38.46, pytest.approx(average - 38.46)),
        ("gsm8k_pct", 10.0, 12.13, -2.13),
        ("humaneval_pct", 20.0, 16.46, 3.54),
    ]


def test_a_headline_metric_stands_for_its_task(tmp_path: Path) -> None:
    rows = [
        {"task": "piqa", "metric": "acc", "value": 0.7},
        {"task": "piqa", "metric": "acc_lowest_perplexity", "value": 0.6, "headline": True},
        {"task": "other", "metric": "bleu", "value": 30.0},
    ]
    ledger = scores(tmp_path, rows)
    assert ask(ledger, "SELECT benchmark, suite, metric, value FROM benchmarks") == [
        ("piqa", "commonsense", "acc_lowest_perplexity", 0.6)
    ]


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("llama2-13b", "llama2-13b"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("openbmb/MiniCPM-1B-sft-bf16", "minicpm-1b"),
        ("SmolLM2-135M", None),
    ],
)
def test_paper_model(home: Home, name: str, paper: str | None) -> None:
    assert ask(home, f"SELECT paper_model('{name}')") == [(paper,)]


def test_paper_gap_of_a_model_the_paper_does_not_treat(home: Home) -> None:
    sql = (
        "SELECT ours, paper, gap, paper_model, source FROM paper_gap "
        f"WHERE run_id = '{home.first_run}' AND setting = 'prosparse' AND metric = 'sparsity_pct'"
    )
    assert ask(home, sql) == [(pytest.approx(84.0), 89.32, None, "llama2-7b", "arXiv 2402.13516 Table 1")]
    sql = "SELECT ours, gap FROM paper_gap WHERE run_id IS NULL AND model = 'llama2-13b' AND metric = 's2_us'"
    assert set(ask(home, sql)) == {(None, None)}
    sql = (
        "SELECT ours, paper FROM paper_gap WHERE metric = 's2_speedup' AND setting = 'prosparse' AND run_id IS NOT NULL"
    )
    assert ask(home, sql) == [(4.0, 2.0)]


def test_threshold_tradeoff(home: Home) -> None:
    sql = (
        "SELECT threshold, perplexity_increase_pct, sparsity_gain, chosen FROM threshold_tradeoff "
        f"WHERE run_id = '{home.first_run}' AND corpus = 'mixed' ORDER BY threshold"
    )
    rows = ask(home, sql)
    assert [row[0] for row in rows] == list(THRESHOLDS)
    for threshold, increase, gain, chosen in rows:
        assert increase == pytest.approx(100 * (math.exp(threshold**2) - 1), abs=1e-9)
        assert gain == pytest.approx(0.8 * threshold)
        assert chosen == (threshold == CHOSEN)


def test_loss_curve(home: Home) -> None:
    columns = "stage, step, l1_lambda, lm_loss, l1_term, loss"
    rows = ask(home, f"SELECT {columns} FROM loss_curve WHERE run_id = '{home.first_run}' ORDER BY step")
    assert [(row[0], row[1]) for row in rows] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (2, 6), (2, 7), (2, 8)]
    assert rows[-1][2] == pytest.approx(0.4)
    assert all(loss == lm_loss + l1_term for *_, lm_loss, l1_term, loss in rows)


def test_speedup_compares_only_like_with_like(home: Home) -> None:
    rows = home.ledger.query("FROM speedup ORDER BY kernel").records()
    assert [(row["kernel"], row["provider"], row["baseline"]) for row in rows] == [
        ("s2", "cpu", "torch"),
        ("s3", "cpu", "torch"),
    ]
    row = rows[0]
    assert (row["speedup"], row["baseline_us"], row["p50_us"]) == (4.0, 200.0, 50.0)
    assert (row["speedup_low"], row["speedup_high"]) == (190.0 / 55.0, 210.0 / 45.0)
    assert (row["run_id"], row["model"], row["setting"]) == (home.first_run, MODEL, "prosparse")


@pytest.mark.parametrize(
    ("column", "other"),
    [
        ("threads", 2),
        ("dtype", "bf16"),
        ("d_ff", 1),
        ("sparsity", 0.5),
        ("timer", "event"),
        ("num_tokens", 8),
        ("mask_source", "random"),
        ("cpu", "Other CPU"),
        ("host", "other"),
        ("cache", "cold"),
        ("layer", 3),
        ("device", "gpu"),
    ],
)
def test_speedup_needs_every_condition_equal(tmp_path: Path, column: str, other: Any) -> None:
    ledger = Ledger(tmp_path)
    variant, *facts = speed_facts({"table": "variants", "variant": "v", "model": "m", "setting": "prosparse"})
    two = [fact for fact in facts if fact["kernel"] == "s3" and fact["provider"] in ("torch", "cpu")]
    two[1] = {**two[1], column: other}
    ledger.record_artifact(make_artifact(tmp_path, "speed", "s", [variant, *two]).path)
    assert ask(ledger, "SELECT count(*) FROM speed") == [(2,)]
    assert ask(ledger, "FROM speedup") == []


def test_lineage_goes_back_to_the_source(home: Home) -> None:
    export = home.artifacts["export"]
    sql = f"SELECT depth, role, step, label, artifact FROM lineage_of('{export.digest}')"
    rows = ask(home, sql)
    labels = [row[3] for row in rows]
    assert rows[0][:4] == (0, None, "export", "export")
    assert set(labels[1:3]) == {"calibrate", "stage 2"}
    assert set(labels) == {"export", "calibrate", "mixture", "stage 0", "stage 1", "stage 2", "base model"}
    assert len(labels) == len(set(labels))
    depths = {row[3]: row[0] for row in rows}
    assert depths["base model"] == 3
    assert ask(home, sql.replace(str(export.digest), str(export.digest)[:12])) == rows, (
        "the beginning of a digest will do"
    )


def test_artifacts_keep_their_identity(home: Home) -> None:
    speed = home.artifacts["speed"]
    [row] = home.ledger.query(f"FROM artifacts WHERE digest = '{speed.digest}'").records()
    assert row["path"] == str(speed.path.relative_to(home.path))
    assert row["payload"] == json.loads((speed.path / "artifact.json").read_text())["payload"]
    assert (row["fingerprint"], row["wall_s"], row["num_files"]) == (speed.fingerprint, 12.5, 2)
    assert row["bytes"] == sum(p.stat().st_size for p in speed.path.iterdir() if p.name != "artifact.json")


@pytest.mark.parametrize(("question", "sql"), EXAMPLES, ids=[question for question, _ in EXAMPLES])
def test_every_example_answers(home: Home, question: str, sql: str) -> None:
    assert question[0].isupper()
    table = home.ledger.query(sql)
    assert len(table) > 0, "an example without an answer explains nothing"
    assert len(table.columns) == len(table.rows[0])


def test_every_view_can_be_read(home: Home) -> None:
    for (view,) in ask(home, "SELECT view_name FROM duckdb_views() WHERE NOT internal"):
        assert len(home.ledger.query(f"FROM {view}")) > 0, view


# The published numbers: counted and checked against sums that no single wrong digit survives.


def test_published_rows_per_source(home: Home) -> None:
    rows = dict(ask(home, "SELECT replace(source, 'arXiv 2402.13516 ', ''), count(*) FROM published GROUP BY ALL"))
    assert rows == {
        "Table 1": 96,
        "Table 2": 62,
        "Table 3": 110,
        "Table 4": 12,
        "Table 5": 16,
        "Table 8": 80,
        "Table 9": 20,
        "ProSparse-LLaMA-2-7B model card, early revision": 41,
    }
    grouped = "FROM published GROUP BY model, setting, metric, condition, source"
    sql = f"SELECT model, setting, metric {grouped} HAVING count(*) > 1"
    assert ask(home, sql) == []


def test_published_averages_are_the_means_of_their_columns(home: Home) -> None:
    sql = """
      SELECT p.model, p.setting, avg(p.value) AS mean, any_value(a.value) AS average FROM published p
      JOIN published a ON (a.model, a.setting, a.source) = (p.model, p.setting, p.source) AND a.metric = 'average_pct'
      WHERE p.metric IN
        ('code_pct', 'commonsense_pct', 'reading_pct', 'gsm8k_pct', 'mmlu_pct', 'bbh_pct', 'agieval_pct')
      GROUP BY ALL"""
    rows = ask(home, sql)
    assert len(rows) == 14
    for model, setting, mean, average in rows:
        assert mean == pytest.approx(average, abs=0.0101), (model, setting)


def test_published_groups_are_the_means_of_their_benchmarks(home: Home) -> None:
    for suite, parts in {
        "code": ("humaneval", "mbpp"),
        "commonsense": ("piqa", "siqa", "hellaswag", "winogrande", "copa"),
        "reading": ("boolq", "lambada", "tydiqa"),
    }.items():
        wanted = ", ".join(f"'{part}_pct'" for part in parts)
        sql = (
            "SELECT p.model, p.setting, avg(p.value), any_value(g.value), count(*) FROM published p JOIN published g "
            f"ON (g.model, g.setting, g.metric) = (p.model, p.setting, '{suite}_pct') AND g.source LIKE '%Table 1' "
            f"WHERE p.metric IN ({wanted}) GROUP BY ALL"
        )
        rows = ask(home, sql)
        assert len(rows) == 11
        for model, setting, mean, group, count in rows:
            assert count == len(parts)
            assert mean == pytest.approx(group, abs=0.02), (suite, model, setting)


def test_published_numbers_agree_between_tables(home: Home) -> None:
    grouped = "FROM published GROUP BY model, setting, metric, condition"
    assert ask(home, f"SELECT model, setting, metric {grouped} HAVING min(value) < max(value)") == []
    row = "(model, setting, metric) = ('llama2-7b', 'prosparse', 'sparsity_pct')"
    sql = f"SELECT value FROM published WHERE {row} AND condition = "
    assert set(ask(home, sql + "''")) == {(89.32,)}
    assert ask(home, sql + "'threshold=0.02'") == [(90.35,)]
    assert ask(home, sql + "'tokens=89.13e9'") == [(88.29,)]


def test_published_speedups_are_the_ratios_of_their_times(home: Home) -> None:
    for kernel in ("s2", "s3"):
        sql = (
            "SELECT p.model, p.setting, d.value / p.value, s.value FROM published p "
            "JOIN published d ON (d.model, d.setting, d.metric) = (p.model, 'original', p.metric) "
            f"JOIN published s ON (s.model, s.setting, s.metric) = (p.model, p.setting, '{kernel}_speedup') "
            f"WHERE p.metric = '{kernel}_us'"
        )
        rows = ask(home, sql)
        assert len(rows) == 10
        for model, setting, ratio, printed in rows:
            assert ratio == pytest.approx(printed, abs=0.011), (model, setting)


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
