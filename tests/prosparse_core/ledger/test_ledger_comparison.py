"""Settings over seeds, and progressive factors beside fixed ones at the same sparsity: by hand and by a slow twin."""

from __future__ import annotations

import dataclasses
import math
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from compare_runs import CORPORA, ROWS, TOKENS, Row, write_comparison, write_rows
from ledger_fixture import ask, make_artifact, record_step, start_run
from scipy import stats

from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger, schema

EVEN = math.sqrt(1000**2 + 3000**2) / 4000
"""What is left of a relative error shared by two corpora of 1000 and 3000 tokens."""


def mixture(row: Row) -> tuple[float, float]:
    """(perplexity, standard error) over both corpora, each by its share of the mixture."""
    total = sum(CORPORA.values())
    value = math.exp(sum(n * math.log(p) for n, p in zip(CORPORA.values(), row.perplexities, strict=True)) / total)
    nats = [n / total * row.stderr / p for n, p in zip(CORPORA.values(), row.perplexities, strict=True)]
    return value, value * math.hypot(*nats)


def even(setting: str, perplexity: float, sparsity: float, l1: float, **more: Any) -> Row:
    """A row with the same perplexity on both corpora and 1 % standard error on their mixture."""
    error = more.pop("error", 0.01)
    return Row(setting, (perplexity, perplexity), sparsity, l1, stderr=error / EVEN * perplexity, **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A ledger that grows by a run a test."""
    return Ledger(tmp_path_factory.mktemp("small"))


def found(ledger: Ledger, *rows: Row, view: str = "matched_sparsity") -> list[dict[str, Any]]:
    """What a view says about a new run that measured these rows."""
    run_id = f"run-{len(ask(ledger, 'FROM runs')) if ledger.exists() else 0}"
    write_rows(ledger, run_id, *rows)
    return ledger.query(f"FROM {view} WHERE run_id = '{run_id}' ORDER BY setting, sparsity").records()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return write_comparison(tmp_path_factory.mktemp("comparison"))[0]


def test_the_leaderboard_tells_rows_of_one_setting_apart(ledger: Ledger) -> None:
    rows = ledger.query("FROM leaderboard WHERE setting <> 'prosparse' ORDER BY tokens_seen, l1, seed DESC").records()
    expected = sorted(ROWS, key=lambda r: (r.tokens, -1 if r.l1 is None else r.l1, -(r.seed or 0)))
    told = [(r["setting"], r["l1"], r["seed"]) for r in rows]
    assert told == [(r.setting, r.l1, r.seed) for r in expected]
    for row, wanted in zip(rows, expected, strict=True):
        perplexity, stderr = mixture(wanted)
        assert row["perplexity"] == pytest.approx(perplexity, rel=1e-12)
        assert row["perplexity_stderr"] == pytest.approx(stderr, rel=1e-12)
        assert (row["accuracy"], row["accuracy_stderr"]) == (0.5, pytest.approx(0.06))


def test_a_standard_error_by_hand(small: Ledger) -> None:
    """exp(1/4 ln 2 + 3/4 ln 4) = 2^1.75; errors of 5 % and 2.5 % weigh a quarter and three quarters."""
    row = found(small, Row("vanilla_relu", (2.0, 4.0), 0.6), view="leaderboard")[0]
    assert row["perplexity"] == pytest.approx(2**1.75)
    assert row["perplexity_stderr"] == pytest.approx(2**1.75 * math.hypot(0.25 * 0.05, 0.75 * 0.025))


def test_no_standard_error_where_a_corpus_has_none(small: Ledger) -> None:
    [row] = found(small, Row("vanilla_relu", (2.0, 4.0), 0.6, stderr=None), view="leaderboard")
    assert row["perplexity"] == pytest.approx(2**1.75)
    assert row["perplexity_stderr"] is None


def test_accuracy_has_the_error_of_a_mean(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    variant = {"table": "variants", "variant": "v", "model": "m", "setting": "prosparse"}
    score = {"table": "evaluations", "variant": "v", "metric": "acc", "higher_is_better": True, "n": 10}
    scores = [
        {**score, "task": "piqa", "value": 0.5, "stderr": 0.03},
        {**score, "task": "mmlu_anatomy", "value": 0.4, "stderr": 0.05},
        {**score, "task": "mmlu_virology", "value": 0.6, "stderr": 0.05},
    ]
    start_run(ledger, "r")
    record_step(ledger, "r", make_artifact(tmp_path, "evaluate", "e", [variant, *scores]))
    mmlu = math.hypot(0.05, 0.05) / 2
    assert ask(ledger, "SELECT benchmark, stderr FROM benchmarks ORDER BY ALL") == [
        ("mmlu", pytest.approx(mmlu)),
        ("piqa", 0.03),
    ]
    [(accuracy, stderr)] = ask(ledger, "SELECT accuracy, accuracy_stderr FROM leaderboard")
    assert (accuracy, stderr) == (pytest.approx(0.5), pytest.approx(math.hypot(mmlu, 0.03) / 2))
    start_run(ledger, "s")
    scores[0] = {**scores[0], "stderr": None}
    record_step(ledger, "s", make_artifact(tmp_path, "evaluate", "again", [variant, *scores]))
    assert ask(ledger, "SELECT accuracy_stderr FROM leaderboard WHERE run_id = 's'") == [(None,)]


def test_comparison_means_over_seeds(ledger: Ledger) -> None:
    rows = ledger.query("FROM comparison WHERE setting <> 'prosparse' ORDER BY setting, l1").records()
    told = [(r["setting"], r["l1"], r["num_seeds"], r["seeds"]) for r in rows]
    assert told == [
        ("closed_loop", 0.21, 1, [42]),
        ("fixed_l1", 0.3, 2, [1, 42]),
        ("fixed_l1", 0.8, 1, [42]),
        ("original", None, 1, [None]),
        ("prosparse_star", 1.0, 2, [1, 42]),
        ("vanilla_relu", 0.0, 1, [42]),
    ]
    star = rows[4]
    seeds = [mixture(r) for r in ROWS if r.setting == "prosparse_star"]
    assert star["perplexity"] == pytest.approx(statistics.mean(p for p, _ in seeds))
    assert star["perplexity_sd"] == pytest.approx(statistics.stdev(p for p, _ in seeds))
    assert star["perplexity_stderr"] == pytest.approx(statistics.mean(e for _, e in seeds))
    assert (star["sparsity"], star["sparsity_sd"]) == (pytest.approx(0.86), pytest.approx(0.02 / math.sqrt(2)))
    assert (star["accuracy"], star["accuracy_sd"]) == (0.5, 0.0)
    assert star["perplexities"] == [pytest.approx(p) for p, _ in reversed(seeds)], "in the order of seeds"
    assert star["tokens_seen"] == TOKENS
    for single in (rows[0], rows[2], rows[3], rows[5]):
        assert [single[c] for c in ("perplexity_sd", "sparsity_sd", "accuracy_sd")] == [None, None, None]


def test_steered_factors_of_several_seeds_are_one_line(small: Ledger) -> None:
    """closed_loop ends with another factor for each seed: that makes it no setting with several factors."""
    rows = found(
        small,
        even("closed_loop", 5.0, 0.7, 0.31),
        even("closed_loop", 6.0, 0.7, 0.33, seed=1),
        even("linear_ramp", 5.0, 0.7, 0.3),
        even("linear_ramp", 6.0, 0.8, 0.9),
        view="comparison",
    )
    told = [(r["setting"], r["l1"], r["num_seeds"]) for r in rows]
    assert told == [("closed_loop", None, 2), ("linear_ramp", 0.3, 1), ("linear_ramp", 0.9, 1)]


def test_what_is_no_seed_is_not_averaged(small: Ledger) -> None:
    """Two checkpoints of one seed and factor differ in something else: each has its line."""
    rows = found(small, even("drelu", 5.0, 0.7, 0.3), even("drelu", 6.0, 0.8, 0.3), view="comparison")
    assert [(r["num_seeds"], r["perplexity_sd"]) for r in rows] == [(1, None), (1, None)]


def test_matched_sparsity_by_hand(small: Ledger) -> None:
    """Halfway from 10 to 20 on a log scale is the root of 200."""
    [row] = found(small, VANILLA, FIXED, even("prosparse_star", 12.0, 0.7, 1.0))
    assert row["fixed_perplexity"] == pytest.approx(math.sqrt(200))
    assert row["difference_pct"] == pytest.approx(100 * (12 / math.sqrt(200) - 1))
    assert (row["l1_below"], row["l1_above"], row["l1"]) == (0.0, 0.5, 1.0)
    assert (row["measured"], row["with_thresholds"], row["num_pairs"], row["seeds"]) == ("progressive", False, 1, [42])
    assert (row["difference_low_pct"], row["difference_high_pct"], row["reason"]) == (None, None, None)
    assert row["no_interval"] == "one pair of seeds has no spread: an interval needs two"


def test_seeds_are_paired(small: Ledger) -> None:
    """Every seed costs 3 and 5 % more than its own fixed factors, though the seeds lie 30 % apart: the difference is
    between arms that read the same text in the same order."""
    rows = []
    for seed, level, more in ((0, 10.0, 1.03), (1, 13.0, 1.05)):
        rows += [even("vanilla_relu", level, 0.6, 0.0, seed=seed), even("fixed_l1", 2 * level, 0.8, 0.5, seed=seed)]
        rows.append(even("prosparse_star", more * math.sqrt(2) * level, 0.7, 1.0, seed=seed))
    [row] = found(small, *rows)
    assert row["differences_pct"] == [pytest.approx(3.0), pytest.approx(5.0)]
    assert (row["num_pairs"], row["seeds"], row["no_interval"]) == (2, [0, 1], None)
    mean, half = math.log(1.03 * 1.05) / 2, 12.70620474 * math.log(1.05 / 1.03) / 2
    told = [row[c] for c in ("difference_pct", "difference_low_pct", "difference_high_pct")]
    assert told == [pytest.approx(100 * (math.exp(mean + k * half) - 1)) for k in (0, -1, 1)]


def twin(rows: list[Row], arm: str, other: str) -> dict[float, tuple[list[float], list[float]]]:
    """By factor of ``arm``: (sparsities, progressive minus fixed in ln(perplexity)) of the seeds whose other arm has
    that sparsity, by plain loops."""
    found: dict[float, tuple[list[float], list[float]]] = {}
    for row in sorted((r for r in rows if r.setting == arm and r.l1), key=lambda r: (r.l1, r.seed)):
        curve = sorted((r.sparsity, math.log(r.perplexities[0])) for r in rows
                       if r.seed == row.seed and r.setting in (other, "vanilla_relu"))  # fmt: skip
        sparsities, differences = found.setdefault(row.l1 or 0.0, ([], []))
        for (s0, p0), (s1, p1) in pairwise(curve):
            if s0 <= row.sparsity < s1:
                off = math.log(row.perplexities[0]) - (p0 + (p1 - p0) * (row.sparsity - s0) / (s1 - s0))
                sparsities.append(row.sparsity)
                differences.append(off if arm == "prosparse_star" else -off)
    return found


@pytest.mark.parametrize("draw", range(3))
def test_both_arms_are_curves_and_each_is_read_at_the_points_of_the_other(small: Ledger, draw: int) -> None:
    """Against the twin, on curves that are ragged on purpose: points out of reach, seeds without a pair."""
    random = Random(draw)
    rows = []
    for seed in range(3):
        rows.append(even("vanilla_relu", random.uniform(9, 11), random.uniform(0.55, 0.6), 0.0, seed=seed))
        for setting, factors in (("fixed_l1", (0.2, 0.5, 0.9)), ("prosparse_star", (0.2, 0.6, 1.0))):
            rows += [even(setting, random.uniform(11, 30), random.uniform(0.58, 0.9), l1, seed=seed) for l1 in factors]
    rows.append(even("fixed_l1", 14.0, 0.7, 0.5, seed=9))  # a seed that the other arm has not
    told = {(r["measured"], r["l1"]): r for r in found(small, *rows)}
    assert set(told) == {("progressive", 0.2), ("progressive", 0.6), ("progressive", 1.0),
                         ("fixed", 0.2), ("fixed", 0.5), ("fixed", 0.9)}  # fmt: skip
    for measured, arm, other in (
        ("progressive", "prosparse_star", "fixed_l1"),
        ("fixed", "fixed_l1", "prosparse_star"),
    ):
        for factor, (sparsities, differences) in twin(rows, arm, other).items():
            row = told[measured, factor]
            assert row["num_pairs"] == len(differences)
            assert [math.log1p(d / 100) for d in row["differences_pct"] or []] == pytest.approx(differences)
            if not differences:
                assert "extrapolation" in row["reason"]
                continue
            assert row["sparsity"] == pytest.approx(statistics.mean(sparsities))
            assert math.log(row["perplexity"] / row["fixed_perplexity"]) == pytest.approx(statistics.mean(differences))
            if len(differences) > 1:
                error = statistics.stdev(differences) / math.sqrt(len(differences))
                half = stats.t.ppf(0.975, len(differences) - 1) * error
                assert math.log1p(row["difference_high_pct"] / 100) == pytest.approx(
                    statistics.mean(differences) + half
                )
            else:
                assert (row["difference_low_pct"], row["no_interval"].split(";")[0]) == (
                    None, "one pair of seeds has no spread: an interval needs two",
                )  # fmt: skip


def test_thresholds_are_compared_with_thresholds(small: Ledger) -> None:
    """What thresholds make of the fixed arm stands beside what they make of the other, never beside ProSparse*."""
    rows = [VANILLA, FIXED, even("prosparse_star", 12.0, 0.7, 1.0), even("prosparse", 12.1, 0.78, 1.0)]
    told = {r["setting"]: r for r in found(small, *rows)}
    assert "no fixed_l1 of this seed" in told["prosparse"]["reason"], "thresholds on one arm only"
    shifted = [even("vanilla_relu_fatrelu", 10.1, 0.7, 0.0), even("fixed_l1_fatrelu", 20.2, 0.86, 0.5)]
    told = {r["setting"]: r for r in found(small, *rows, *shifted)}
    assert {s: r["with_thresholds"] for s, r in told.items()} == {"prosparse_star": False, "prosparse": True}
    assert told["prosparse"]["fixed_perplexity"] == pytest.approx(math.sqrt(10.1 * 20.2))
    assert told["prosparse_star"]["fixed_perplexity"] == pytest.approx(math.sqrt(200))


def test_student_s_t_is_that_of_the_tables(small: Ledger) -> None:
    freedoms = [*range(1, 32), 40, 100, 10_000]
    found = ask(small, f"SELECT t_quantile(k) FROM unnest({freedoms}) u(k)")
    assert [t for (t,) in found] == pytest.approx([stats.t.ppf(0.975, k) for k in freedoms], abs=3e-6)


def test_fewer_tokens_in_the_same_time_stand_beside_the_factors(small: Ledger) -> None:
    fewer = {"tokens": TOKENS // 2}
    rows = [even(s, 12.0, 0.7, 1.0, **fewer) for s in ("distilled_equal_time", "prosparse_star")]
    timed, star = found(small, VANILLA, FIXED, *rows)
    assert (timed["fixed_perplexity"], timed["tokens_seen"]) == (pytest.approx(math.sqrt(200)), TOKENS // 2)
    assert "no fixed_l1 of this seed that saw as many tokens" in star["reason"]


def test_two_variants_of_one_seed_are_no_pair_of_seeds(small: Ledger) -> None:
    """Two checkpoints of one seed and factor differ in something else: no interval is made of that."""
    rows = found(small, VANILLA, FIXED, even("drelu", 12.0, 0.7, 0.3), even("drelu", 13.0, 0.72, 0.3))
    assert [(r["num_pairs"], r["difference_low_pct"]) for r in rows] == [(1, None), (1, None)]


def test_steered_factors_are_one_line_of_pairs(small: Ledger) -> None:
    steered = [even("closed_loop", 12.0, 0.7, 0.31), even("closed_loop", 12.5, 0.71, 0.33, seed=1)]
    seeds = [dataclasses.replace(row, seed=1) for row in (VANILLA, FIXED)]
    [row] = found(small, VANILLA, FIXED, *seeds, *steered)
    assert (row["num_pairs"], row["l1"], row["measured"]) == (2, None, "progressive")


def test_what_cannot_be_paired_is_left_out_and_told(ledger: Ledger) -> None:
    """Of the made-up comparison, seed 1 has one fixed factor and no plain ReLU: nothing to read between."""
    rows = {r["setting"]: r for r in ledger.query("FROM matched_sparsity WHERE NOT with_thresholds").records()}
    assert set(rows) == {"prosparse_star", "closed_loop"}
    star = rows["prosparse_star"]
    assert (star["num_seeds"], star["num_pairs"], star["seeds"]) == (2, 1, [42])
    assert star["no_interval"] == (
        "one pair of seeds has no spread: an interval needs two; seed 1: its sparsity of 87.00 % is above the most of "
        "the fixed factors, 82.00 %: that would be extrapolation"
    )
    assert (rows["closed_loop"]["l1_below"], rows["closed_loop"]["l1_above"]) == (0.0, 0.3)


VANILLA, FIXED = even("vanilla_relu", 10.0, 0.6, 0.0), even("fixed_l1", 20.0, 0.8, 0.5)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.85, 1.0)], "85.00 % is above the most of the fixed"),
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.55, 1.0)], "55.00 % is below the least of the fixed"),
        ([VANILLA, even("prosparse_star", 12.0, 0.55, 1.0)], "no fixed_l1 of this seed that saw as many tokens"),
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.7, 1.0, tokens=2 * TOKENS)], "no fixed_l1 of this seed"),
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.7, 1.0, seed=7)], "no fixed_l1 of this seed"),
        ([even("prosparse_star", 12.0, 0.7, 1.0)], "no fixed_l1"),
    ],
    ids=["above", "below", "no_fixed", "other_tokens", "other_seed", "alone"],
)  # fmt: skip
def test_never_extrapolated(small: Ledger, rows: list[Row], reason: str) -> None:
    [row] = found(small, *rows)
    assert reason in row["reason"]
    assert row["no_interval"] == row["reason"]
    numbers = ("fixed_perplexity", "difference_pct", "difference_low_pct", "difference_high_pct", "differences_pct")
    assert [row[c] for c in numbers] == [None] * 5


def test_at_a_measured_factor_nothing_is_interpolated(small: Ledger) -> None:
    [row] = found(small, VANILLA, FIXED, even("prosparse_star", 19.0, 0.8, 1.0))
    assert row["fixed_perplexity"] == pytest.approx(20.0)
    assert row["difference_pct"] == pytest.approx(-5.0)


def test_the_nearest_factors_count(small: Ledger) -> None:
    between = [even("fixed_l1", p, s, l1) for p, s, l1 in ((11.0, 0.65, 0.1), (13.0, 0.72, 0.2), (90.0, 0.95, 2.0))]
    [row] = found(small, VANILLA, FIXED, *between, even("prosparse_star", 12.0, 0.7, 1.0))
    assert (row["l1_below"], row["l1_above"]) == (0.1, 0.2)
    assert row["fixed_perplexity"] == pytest.approx(11 * (13 / 11) ** (0.05 / 0.07))


def test_how_lambda_went_is_read_from_the_log(tmp_path: Path) -> None:
    """4 steps of stage 0, then lambda 0.1, 0.2, 0.2, 0.2 while the learning rate falls."""
    ledger = Ledger(tmp_path)
    lambdas, rates = [0, 0, 0, 0, 0.1, 0.2, 0.2, 0.2], [1, 4, 3, 3, 2, 1.5, 1, 0.5]
    log = [{"stage": int(i > 3), "step": i + 1, "l1_lambda": x, "lr": r, "lm_loss": 1.0}
           for i, (x, r) in enumerate(zip(lambdas, rates, strict=True))]  # fmt: skip
    first = make_artifact(tmp_path, "stage", "stage 0", log=log[:4])
    last = make_artifact(tmp_path, "stage", "stage 1", log=log[4:], inputs={"before": first})
    torn = make_artifact(tmp_path, "stage", "torn", log=[log[5], log[7]], inputs={"before": first})
    facts = [{"table": "variants", "variant": f"prosparse_star@{i}", "model": "m", "setting": "prosparse_star",
              "checkpoint": made.digest} for i, made in enumerate((first, last, torn))]  # fmt: skip
    start_run(ledger, "r")
    for made in (first, last, torn, make_artifact(tmp_path, "evaluate", "e", facts)):
        record_step(ledger, "r", made)
    [row] = ledger.query("FROM lambda_courses").records()
    assert row == {
        "checkpoint": last.digest,
        "num_steps": 8,
        "regularized_steps": 4,
        "l1_sum": pytest.approx(0.7),
        "steps_at_last_l1": 3,
        "lr_at_last_l1": pytest.approx(1.5 / 4),
        "lr_left": pytest.approx(3 / 5),
    }


def test_the_conditions_of_the_arms_stand_beside_them(ledger: Ledger) -> None:
    rows = {(r["setting"], r["l1"]): r for r in ledger.query("FROM comparison").records()}
    told = ("num_steps", "regularized_steps", "l1_sum", "steps_at_last_l1", "lr_at_last_l1", "lr_left")
    assert [rows["fixed_l1", 0.3][c] for c in told] == [8, 4, pytest.approx(1.2), 4, 1.0, 1.0]
    assert [rows["prosparse_star", 1.0][c] for c in told] == [8, 4, 4.0, 4, 1.0, 1.0]
    assert [rows["vanilla_relu", 0.0][c] for c in told] == [None] * 6


def test_paper_gap_has_every_published_number_and_tells_rows_apart(ledger: Ledger) -> None:
    gaps = "FROM paper_gap WHERE setting = 'fixed_l1' AND metric = 'sparsity_pct' AND run_id IS NOT NULL"
    card = "ProSparse-LLaMA-2-7B model card, early revision"
    assert sorted(ask(ledger, f"SELECT DISTINCT l1, seed, paper, source {gaps}")) == [
        (0.3, 1, 91.46, card), (0.3, 42, 91.46, card), (0.8, 42, 91.46, card)
    ]  # fmt: skip
    missing = (
        "SELECT count(*) FROM published p WHERE NOT EXISTS ("
        "FROM paper_gap g WHERE (g.paper_model, g.setting, g.metric, "
        "g.condition, g.paper) = (p.model, p.setting, p.metric, p.condition, p.value))"
    )
    assert ask(ledger, missing) == [(0,)]
    sql = "SELECT paper, ours FROM paper_gap WHERE setting = 'prosparse' AND metric = 'average_pct' AND condition = "
    assert ask(ledger, sql + "'threshold=0.02' AND model = 'llama2-13b'") == [(44.67, None)]


def test_an_older_ledger_gets_the_views_before_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the version before comparisons."""
    ledger = Ledger(tmp_path)
    ledger.bring_up_to_date()
    assert not ledger.exists(), "nothing to bring up to date, so nothing is made"
    with monkeypatch.context() as before:
        before.setattr(schema, "_SQL", ("schema.sql", "views.sql", "paper.sql"))
        schema.signature.cache_clear()
        write_rows(ledger, "r", VANILLA)
    schema.signature.cache_clear()
    with pytest.raises(BadInput, match="comparison"):
        ledger.query("FROM comparison")
    ledger.bring_up_to_date()
    assert ask(ledger, "SELECT run_id, setting FROM comparison") == [("r", "vanilla_relu")]
    current = ledger.path.stat().st_ino
    ledger.bring_up_to_date()
    assert ledger.path.stat().st_ino == current, "a current one is not even published anew"


def test_a_column_that_was_renamed_is_carried_over_and_read_from_older_artifacts(tmp_path: Path) -> None:
    """Ledgers and facts of before say limit_speedup where byte_ratio is meant."""
    import duckdb

    ledger = Ledger(tmp_path)
    kernel = {"table": "speed", "kernel": "s2", "provider": "native", "dtype": "fp32", "timer": "wall"}
    made = make_artifact(tmp_path, "speed", "old", [{**kernel, "limit_speedup": 2.5}])
    start_run(ledger, "r")
    record_step(ledger, "r", made)
    assert ask(ledger, "SELECT byte_ratio FROM speed") == [(2.5,)]
    with duckdb.connect(str(ledger.path)) as con:
        views = "SELECT view_name FROM duckdb_views() WHERE NOT internal"
        for (view,) in con.execute(views).fetchall():
            con.execute(f"DROP VIEW {view}")
        con.execute("ALTER TABLE speed RENAME COLUMN byte_ratio TO limit_speedup")
        con.execute("UPDATE schema_version SET signature = 'older'")
    ledger.bring_up_to_date()
    assert ask(ledger, "SELECT byte_ratio FROM speed") == [(2.5,)]
