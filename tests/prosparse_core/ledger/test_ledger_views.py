"""The views: the paper's tables, thresholds, training curves, speedups and lineage, by golden numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ledger_fixture import (
    CHOSEN,
    CORPORA,
    MODEL,
    NUM_LAYERS,
    SHARES,
    THRESHOLDS,
    Home,
    ask,
    evaluation_facts,
    make_artifact,
    record_step,
    shared_home,
    speed_facts,
    start_run,
    variant_fact,
)

from prosparse_core import recipe as recipes
from prosparse_core.ledger import Ledger


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return shared_home(tmp_path_factory)


def test_leaderboard(home: Home) -> None:
    rows = home.ledger.query(f"FROM leaderboard WHERE run_id = '{home.first_run}' ORDER BY sparsity").records()
    assert [row["setting"] for row in rows] == ["original", "prosparse_star", "prosparse"]
    last = rows[-1]
    assert last["recipe"] == last["model"] == MODEL
    assert last["perplexity_by_corpus"] == {c: 7.1 + i for i, c in enumerate(CORPORA)}
    nats = sum(share * math.log(7.1 + i) for i, share in enumerate(SHARES))
    assert last["perplexity"] == pytest.approx(math.exp(nats), rel=1e-14)
    zeros = sum(share * (0.83 + 0.01 * i) for i, share in enumerate(SHARES))
    assert last["sparsity"] == pytest.approx(zeros, abs=1e-12), "both axes by the mixture's shares, not by tokens"
    assert (last["weighted_by"], last["window_tokens"], last["num_documents"]) == ("mixture", 512, 60)
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
        *({"task": task, "metric": "acc,none", "value": 0.6} for task in ("piqa", "hellaswag", "winogrande")),
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
    assert (row["num_benchmarks"], row["incomplete"]) == (15, [])
    sql = "SELECT metric, round(ours, 9), paper, round(gap, 9) FROM paper_gap WHERE run_id = 'r' AND metric IN "
    rows_found = ask(ledger, sql + "('average_pct', 'humaneval_pct', 'gsm8k_pct') ORDER BY metric")
    average = 100 * sum(expected.values()) / 7
    assert rows_found == [
        ("average_pct", pytest.approx(average), 38.46, pytest.approx(average - 38.46)),
        ("gsm8k_pct", 10.0, 12.13, -2.13),
        ("humaneval_pct", 20.0, 16.46, 3.54),
    ]


def test_a_part_of_the_tokens_has_no_gap_to_the_paper_s_whole(tmp_path: Path) -> None:
    """vanilla_relu of the main path is its stage 0; the paper's row saw every token."""
    ledger = Ledger(tmp_path)
    start_run(ledger, "r", model="Llama-2-7b-hf", recipe_yaml=recipes.load("llama2-7b").to_yaml())
    for setting, tokens in (("vanilla_relu", 10_485_760_000), ("prosparse", 34_603_008_000), ("original", 0)):
        variant = {"table": "variants", "variant": setting, "model": "Llama-2-7b-hf", "setting": setting}
        variant["tokens_seen"] = tokens
        score = {"table": "evaluations", "variant": setting, "task": "gsm8k", "metric": "acc", "value": 0.1}
        zeros = {"table": "sparsity", "variant": setting, "corpus": "c", "layer": 0, "num_tokens": 9, "sparsity": 0.66}
        record_step(ledger, "r", make_artifact(tmp_path, "evaluate", setting, [variant, score, zeros]))
    sql = "SELECT metric, paper, gap, reason FROM paper_gap WHERE run_id = 'r' "
    sql += "AND metric IN ('sparsity_pct', 'gsm8k_pct') "
    whole = ask(ledger, sql + "AND paper IS NOT NULL AND setting <> 'vanilla_relu'")
    assert len(whole) >= 3
    assert all(gap is not None and reason is None for _, _, gap, reason in whole)
    part = ask(ledger, sql + "AND setting = 'vanilla_relu' ORDER BY metric DESC")
    assert part[0][:2] == ("sparsity_pct", 66.04)
    why = "ours saw 30 % of the recipe's training tokens, the paper's all of them"
    assert {(gap, reason) for _, paper, gap, reason in part if paper is not None} == {(None, why)}


def test_a_mean_that_lacks_a_benchmark_is_not_the_papers(tmp_path: Path) -> None:
    """One of five commonsense benchmarks, and a group of which a task is n/a: values, but no gap and no average."""
    whole = ("humaneval", "mbpp", "piqa", "boolq", "lambada_openai", "tydiqa_goldp_en", "gsm8k", "mmlu")
    rows: list[dict[str, Any]] = [
        {"task": task, "metric": "acc", "value": 0.5, "stderr": 0.03, "limit": 10} for task in whole
    ]
    rows += [
        {"task": "bbh_fewshot", "metric": "exact_match", "value": 0.3, "stderr": 0.04},
        {"task": "agieval_en", "metric": "acc", "value": 0.4, "stderr": 0.05},
        {"task": "agieval_math", "metric": "acc", "value": None, "note": "dataset x not found in y", "headline": True},
    ]
    ledger = scores(tmp_path, rows)
    [row] = ledger.query("FROM leaderboard").records()
    lacking = ["agieval_math", "copa", "hellaswag", "siqa", "winogrande"]
    assert (row["commonsense"], row["average"], row["average_stderr"], row["incomplete"]) == (0.5, None, None, lacking)
    sql = "SELECT ours, stderr, partial, not_measured, gap FROM paper_gap WHERE run_id = 'r' AND metric = "
    assert ask(ledger, sql + "'commonsense_pct'") == [
        (50.0, 3.0, True, ["siqa", "hellaswag", "winogrande", "copa"], None)
    ]
    assert ask(ledger, sql + "'agieval_pct'") == [(40.0, 5.0, False, ["agieval_math"], None)]
    error = pytest.approx(100 * math.hypot(0.03, 0.03) / 2)
    assert ask(ledger, sql + "'code_pct'") == [(50.0, error, True, [], pytest.approx(50 - 19.42))]
    assert ask(ledger, sql + "'average_pct' AND ours IS NOT NULL") == []


def test_the_average_has_the_error_of_a_mean_of_seven(tmp_path: Path) -> None:
    tasks = [
        "humaneval", "mbpp", "piqa", "siqa", "hellaswag", "winogrande", "copa", "boolq", "lambada", "tydiqa", "gsm8k",
        "mmlu", "bbh", "agieval",
    ]  # fmt: skip
    ledger = scores(tmp_path, [{"task": t, "metric": "acc", "value": 0.5, "stderr": 0.03} for t in tasks])
    [(average, error, incomplete)] = ask(ledger, "SELECT average, average_stderr, incomplete FROM leaderboard")
    squares = sum((0.03 / math.sqrt(n)) ** 2 for n in (2, 5, 3, 1, 1, 1, 1))
    assert (average, error, incomplete) == (pytest.approx(0.5), pytest.approx(math.sqrt(squares) / 7), [])
    ours, stderr = ask(ledger, "SELECT ours, stderr FROM paper_gap WHERE run_id = 'r' AND metric = 'average_pct'")[0]
    assert (ours, stderr) == (pytest.approx(50), pytest.approx(100 * math.sqrt(squares) / 7))


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
    assert ask(home, sql) == [(pytest.approx(83.7), 89.32, None, "llama2-7b", "arXiv 2402.13516 Table 1")]
    sql = "SELECT ours, gap FROM paper_gap WHERE run_id IS NULL AND model = 'llama2-13b' AND metric = 's2_us'"
    assert set(ask(home, sql)) == {(None, None)}
    sql = (
        "SELECT ours, paper, gap, baseline, reason FROM paper_gap "
        "WHERE metric = 's2_speedup' AND setting = 'prosparse' AND run_id IS NOT NULL"
    )
    foreign = f"the paper does not treat {MODEL}: llama2-7b stands beside it"
    device = "ours is on cpu over native_dense, the paper's on an A100 over torch"
    assert ask(home, sql) == [(2.4, 2.0, None, "native_dense", f"{foreign}; {device}")]


def timings(home: Path, model: str, *facts: dict[str, Any], setting: str = "prosparse") -> Ledger:
    """A ledger with one run that timed those kernels of one variant."""
    ledger = Ledger(home)
    variant, *given = speed_facts({"table": "variants", "variant": "v", "model": model, "setting": setting})
    made = make_artifact(home, "speed", "s", [variant, *({**given[0], "byte_ratio": None, **f} for f in facts)])
    start_run(ledger, "r", model=model)
    record_step(ledger, "r", made)
    return ledger


def fact(kernel: str, provider: str, us: float, **changes: Any) -> dict[str, Any]:
    times = {"p20_us": 0.9 * us, "p50_us": us, "p80_us": 1.1 * us}
    return {"kernel": kernel, "provider": provider, **times, "gate_passed": True, **changes}


@pytest.mark.parametrize(
    ("model", "device", "torch_us", "said"),
    [
        ("Llama-2-7b-hf", "NVIDIA A100-SXM4-80GB", 90.0, None),
        ("Llama-2-7b-hf", "cpu", 90.0, "ours is on cpu over torch, the paper's on an A100 over torch"),
        ("Llama-2-7b-hf", "NVIDIA H100 PCIe", 90.0, "ours is on NVIDIA H100 PCIe over torch, the paper's on an A100"),
        ("Llama-2-7b-hf", "NVIDIA A100-SXM4-80GB", 300.0, "ours is on NVIDIA A100-SXM4-80GB over native_dense"),
        ("SmolLM2-135M", "NVIDIA A100-SXM4-80GB", 90.0, "the paper does not treat SmolLM2-135M: llama2-7b stands"),
    ],
)
def test_a_speedup_has_a_gap_on_the_papers_device_model_and_baseline_alone(
    tmp_path: Path, model: str, device: str, torch_us: float, said: str | None
) -> None:
    times = {"torch": torch_us, "native_dense": 200.0, "native": 30.0}
    ledger = timings(tmp_path, model, *(fact("s2", p, us, device=device) for p, us in times.items()))
    sql = "SELECT ours, gap, reason FROM paper_gap WHERE run_id = 'r' AND metric = 's2_speedup'"
    [(ours, gap, reason)] = ask(ledger, sql)
    assert ours == pytest.approx(min(torch_us, 200.0) / 30)
    if said is None:
        assert (gap, reason) == (pytest.approx(3.0 - 2.0), None)
    else:
        assert gap is None
        assert reason.startswith(said)


def test_decoding_stands_beside_the_paper_as_the_closing_line_shows_it(tmp_path: Path) -> None:
    """Not the largest ratio of all, which was a certified gate over transformers."""
    ways = {"transformers_dense": 480.0, "native_dense": 39.4, "native_exact": 20.0, "native_certified": 18.0}
    facts = [fact("decode", p, us, dtype="float32", prompt_tokens=32) for p, us in ways.items()]
    facts += [fact("decode", p, us / 2, dtype="float16", prompt_tokens=32) for p, us in ways.items() if us < 100]
    facts += [fact("decode", p, us**0.9, dtype="float32", prompt_tokens=512) for p, us in ways.items()]
    facts += [fact("decode", p, us, dtype="float32", prompt_tokens=32, mask_source="raised") for p, us in ways.items()]
    ledger = timings(tmp_path, "Llama-2-7b-hf", *facts, setting="prosparse_star")
    sql = "SELECT round(ours, 2), baseline, gap, reason FROM paper_gap WHERE run_id = 'r' AND metric = 'decode_speedup'"
    said = "ours is on cpu over native_dense, the paper's on an A100 over llama_cpp"
    assert ask(ledger, sql) == [(1.97, "native_dense", None, said)]


def test_a_number_nobody_measured_and_one_nobody_printed_say_so(home: Home) -> None:
    sql = "SELECT DISTINCT reason FROM paper_gap WHERE ours IS NULL"
    assert ask(home, sql) == [("not measured here",)]
    reasons = ask(home, "SELECT DISTINCT reason FROM paper_gap WHERE ours IS NOT NULL AND paper IS NULL")
    assert all(reason.startswith("the paper prints no such number") for (reason,) in reasons)
    assert ask(home, "SELECT count(*) FROM paper_gap WHERE (gap IS NULL) <> (reason IS NOT NULL)") == [(0,)]


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


def test_shrinkage_is_of_the_survivors_beside_the_dense_model_of_the_same_run(home: Home) -> None:
    columns = "layer, mean_abs_live, dense_mean_abs_x1, survivor_ratio, chunk_sparsity, dead_frac"
    where = f"run_id = '{home.first_run}' AND setting = 'prosparse' AND corpus = 'package-docs'"
    rows = ask(home, f"SELECT {columns} FROM shrinkage WHERE {where} ORDER BY layer")
    assert [row[0] for row in rows] == list(range(NUM_LAYERS))
    for layer, live, dense, ratio, chunk, dead in rows:
        assert dense == 0.05
        assert (live is None) == (ratio is None) == (layer == 3)
        if live is not None:
            assert live == pytest.approx(0.1 * 0.17 * (layer + 1))
            assert ratio == pytest.approx(live / 0.05)
        assert (chunk, dead) == (pytest.approx(0.79), 0.01)
    per_run = ask(home, "SELECT run_id, count(*) FROM shrinkage GROUP BY run_id ORDER BY run_id")
    whole = NUM_LAYERS * len(CORPORA) * 3
    assert per_run == [(home.first_run, whole), (home.second_run, whole)], "what was measured twice counts once"


def test_without_the_dense_model_there_is_no_ratio(tmp_path: Path) -> None:
    base = make_artifact(tmp_path, "base_model", "base")
    fact = variant_fact("prosparse", base, "fatrelu")
    made = make_artifact(tmp_path, "evaluate", "e", evaluation_facts(fact, 5.0, 0.8, 0.5, 0.1))
    ledger = Ledger(tmp_path)
    start_run(ledger, "r")
    record_step(ledger, "r", made)
    sql = "SELECT count(*), count(mean_abs_live), count(survivor_ratio), count(dense_mean_abs_x1) FROM shrinkage"
    assert ask(ledger, sql) == [(12, 9, 0, 0)]


def test_loss_curve(home: Home) -> None:
    columns = "stage, step, l1_lambda, lm_loss, l1_term, loss"
    rows = ask(home, f"SELECT {columns} FROM loss_curve WHERE run_id = '{home.first_run}' ORDER BY step")
    assert [(row[0], row[1]) for row in rows] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (2, 6), (2, 7), (2, 8)]
    assert rows[-1][2] == pytest.approx(0.4)
    assert all(loss == lm_loss + l1_term for *_, lm_loss, l1_term, loss in rows)


def test_speedup_compares_only_like_with_like(home: Home) -> None:
    rows = home.ledger.query("FROM speedup ORDER BY kernel, baseline").records()
    found = [(row["kernel"], row["provider"], row["baseline"], row["speedup"], row["is_best"]) for row in rows]
    assert found == [
        ("s2", "native", "native_dense", 2.4, True),
        ("s2", "native", "torch", 4.0, False),
        ("s3", "native", "native_dense", 2.4, True),
        ("s3", "native", "torch", 4.0, False),
    ]
    assert [row["byte_ratio"] for row in rows] == [5.5, None, 5.5, None], "beside the best dense kernel only"
    assert [row["above_byte_ratio"] for row in rows] == [False, None, False, None]
    row = rows[1]
    assert (row["baseline_us"], row["p50_us"]) == (200.0, 50.0)
    assert (row["speedup_low"], row["speedup_high"]) == (190.0 / 55.0, 210.0 / 45.0)
    assert (row["run_id"], row["model"], row["setting"]) == (home.first_run, MODEL, "prosparse")


def test_what_gains_more_than_the_bytes_it_saves_is_flagged_and_explained(tmp_path: Path) -> None:
    ledger = timings(
        tmp_path,
        "m",
        fact("ffn", "torch", 400.0, gbps=9.0),
        fact("ffn", "native_dense", 200.0, gbps=12.0),
        fact("ffn", "native", 50.0, gbps=18.0, byte_ratio=2.7),
        fact("ffn", "certified", 70.0, gbps=12.3, byte_ratio=2.8),
        fact("s3", "native_dense", 200.0),
        fact("s3", "native", 50.0, byte_ratio=None, byte_ratio_note="n/a: the weights fit"),
    )
    sql = "SELECT provider, byte_ratio, above_byte_ratio, above_byte_ratio_note, byte_ratio_note FROM speedup "
    assert ask(ledger, sql + "WHERE is_best ORDER BY kernel, provider DESC") == [
        ("native", 2.7, True, "above its byte ratio: it reads 18.0 GB/s, its baseline 12.0", None),
        (
            "certified",
            2.8,
            True,
            "above its byte ratio: it reads 12.3 GB/s, its baseline 12.0; within the spread of the timings",
            None,
        ),
        ("native", None, None, None, "n/a: the weights fit"),
    ]
    assert ask(ledger, sql + "WHERE NOT is_best AND (byte_ratio, above_byte_ratio) IS DISTINCT FROM (NULL, NULL)") == []


def test_the_best_baseline_is_one_for_all_layers_of_a_kernel(tmp_path: Path) -> None:
    facts = []
    for layer, dense in enumerate(({"torch": 100.0, "native_dense": 90.0}, {"torch": 100.0, "native_dense": 200.0})):
        for provider, us in {**dense, "native": 50.0}.items():
            facts.append(fact("ffn", provider, us, layer=layer, sparsity=0.8 + layer / 10))
    ledger = timings(tmp_path, "m", *facts)
    assert ask(ledger, "SELECT layer, baseline FROM speedup WHERE is_best ORDER BY layer") == [
        (0, "torch"),
        (1, "torch"),
    ]


@pytest.mark.parametrize(
    ("column", "other"),
    [
        ("prompt_tokens", 512),
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
    two = [fact for fact in facts if fact["kernel"] == "s3" and fact["provider"] in ("torch", "native")]
    two[1] = {**two[1], column: other}
    ledger.record_artifact(make_artifact(tmp_path, "speed", "s", [variant, *two]).path)
    assert [fact["provider"] for fact in two] == ["torch", "native"]
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
