"""Settings over seeds, and progressive factors beside fixed ones at the same sparsity: by hand and by a slow twin."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from compare_runs import CORPORA, ROWS, TOKENS, Row, write_comparison, write_rows
from ledger_fixture import ask, make_artifact, record_step, start_run

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
    """Halfway from 10 to 20 on a log scale is the root of 200; errors of 1 % weigh 1, 1/2 and 1/2."""
    [row] = found(
        small,
        even("vanilla_relu", 10.0, 0.6, 0.0),
        even("fixed_l1", 20.0, 0.8, 0.5),
        even("prosparse_star", 12.0, 0.7, 1.0),
    )
    assert row["fixed_perplexity"] == pytest.approx(math.sqrt(200))
    assert row["difference_pct"] == pytest.approx(100 * (12 / math.sqrt(200) - 1))
    assert row["difference_stderr_pct"] == pytest.approx(12 / math.sqrt(200) * math.sqrt(1.5))
    assert (row["l1_below"], row["l1_above"]) == (0.0, 0.5)
    assert (row["sparsity_below"], row["sparsity_above"]) == (pytest.approx(0.6), pytest.approx(0.8))
    assert (row["error_source"], row["degrees_of_freedom"], row["reason"]) == ("evaluation", None, None)


def test_matched_sparsity_over_seeds_is_the_spread_off_the_line(small: Ledger) -> None:
    """The twin: every seed's distance from the line of that slope, and the standard errors of their means."""
    rows = [
        *(even("fixed_l1", p, s, 0.3, seed=k) for k, (p, s) in enumerate([(10.0, 0.60), (10.4, 0.62), (9.9, 0.61)])),
        *(even("fixed_l1", p, s, 0.9, seed=k) for k, (p, s) in enumerate([(20.0, 0.80), (22.0, 0.81)])),
        *(even("prosparse_star", p, s, 1.0, seed=k) for k, (p, s) in enumerate([(12.0, 0.69), (12.6, 0.71)])),
    ]
    [row] = found(small, *rows)
    low, high, star = ([r for r in rows if (r.setting, r.l1) == key] for key in
                       (("fixed_l1", 0.3), ("fixed_l1", 0.9), ("prosparse_star", 1.0)))  # fmt: skip
    zeros = [statistics.mean(r.sparsity for r in part) for part in (low, high, star)]
    nats = [math.log(statistics.mean(r.perplexities[0] for r in part)) for part in (low, high, star)]
    slope = (nats[1] - nats[0]) / (zeros[1] - zeros[0])
    share = (zeros[2] - zeros[0]) / (zeros[1] - zeros[0])
    squares = []
    for part, weight in ((low, 1 - share), (high, share), (star, 1.0)):
        off = [math.log(r.perplexities[0]) - slope * r.sparsity for r in part]
        squares.append(weight**2 * statistics.variance(off) / len(off))
    squared, freedom = sum(squares), (3 - 1, 2 - 1, 2 - 1)
    welch = squared**2 / sum(s**2 / k for s, k in zip(squares, freedom, strict=True))
    fixed = math.exp(nats[0] + share * (nats[1] - nats[0]))
    assert row["fixed_perplexity"] == pytest.approx(fixed)
    assert row["difference_pct"] == pytest.approx(100 * (12.3 / fixed - 1))
    assert row["difference_stderr_pct"] == pytest.approx(100 * 12.3 / fixed * math.sqrt(squared))
    assert (row["error_source"], row["num_seeds"]) == ("seeds", 2)
    assert row["degrees_of_freedom"] == pytest.approx(welch)
    assert 1 <= welch <= sum(freedom)


def test_what_few_seeds_do_not_know_counts_beside_a_known_error(small: Ledger) -> None:
    """Two seeds of the progressive setting, one of each factor: a variance of one degree of freedom and a known one."""
    star = [even("prosparse_star", p, 0.7, 1.0, seed=k) for k, p in enumerate((12.0, 13.0))]
    [row] = found(small, VANILLA, FIXED, *star)
    seeds, known = statistics.variance(math.log(p) for p in (12.0, 13.0)) / 2, 0.01**2 / 2
    assert row["degrees_of_freedom"] == pytest.approx((seeds + known) ** 2 / seeds**2)
    assert row["error_source"] == "seeds and evaluation"


def test_fewer_tokens_in_the_same_time_stand_beside_the_factors(small: Ledger) -> None:
    fewer = {"tokens": TOKENS // 2}
    rows = [even(s, 12.0, 0.7, 1.0, **fewer) for s in ("distilled_equal_time", "prosparse_star")]
    timed, star = found(small, VANILLA, FIXED, *rows)
    assert (timed["fixed_perplexity"], timed["tokens_seen"]) == (pytest.approx(math.sqrt(200)), TOKENS // 2)
    assert "no fixed_l1 that saw as many tokens" in star["reason"]


def test_single_seeds_lend_the_evaluations_error(ledger: Ledger) -> None:
    rows = {r["setting"]: r for r in ledger.query("FROM matched_sparsity").records()}
    assert set(rows) == {"prosparse_star", "closed_loop"}, "thresholds shift the sparsity of prosparse: not comparable"
    assert rows["prosparse_star"]["error_source"] == rows["closed_loop"]["error_source"] == "seeds and evaluation"
    assert all(row["degrees_of_freedom"] > 2 - 1 for row in rows.values()), "one seed's error counts as known"
    assert (rows["closed_loop"]["l1_below"], rows["closed_loop"]["l1_above"]) == (0.0, 0.3)


VANILLA, FIXED = even("vanilla_relu", 10.0, 0.6, 0.0), even("fixed_l1", 20.0, 0.8, 0.5)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.85, 1.0)], "85.00 % is above the most of the fixed"),
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.55, 1.0)], "55.00 % is below the least of the fixed"),
        ([VANILLA, even("prosparse_star", 12.0, 0.55, 1.0)], "no fixed_l1 that saw as many tokens"),
        ([VANILLA, FIXED, even("prosparse_star", 12.0, 0.7, 1.0, tokens=2 * TOKENS)], "no fixed_l1 that saw as many"),
        ([even("prosparse_star", 12.0, 0.7, 1.0)], "no fixed_l1"),
    ],
    ids=["above", "below", "no_fixed", "other_tokens", "alone"],
)  # fmt: skip
def test_never_extrapolated(small: Ledger, rows: list[Row], reason: str) -> None:
    [row] = found(small, *rows)
    assert reason in row["reason"]
    numbers = ("fixed_perplexity", "difference_pct", "difference_stderr_pct", "error_source", "degrees_of_freedom")
    assert [row[c] for c in numbers] == [None] * 5


def test_at_a_measured_factor_nothing_is_interpolated(small: Ledger) -> None:
    [row] = found(small, VANILLA, FIXED, even("prosparse_star", 19.0, 0.8, 1.0))
    assert row["fixed_perplexity"] == pytest.approx(20.0)
    assert row["difference_pct"] == pytest.approx(-5.0)
    assert row["difference_stderr_pct"] == pytest.approx(0.95 * math.sqrt(2))


def test_the_nearest_factors_count(small: Ledger) -> None:
    between = [even("fixed_l1", p, s, l1) for p, s, l1 in ((11.0, 0.65, 0.1), (13.0, 0.72, 0.2), (90.0, 0.95, 2.0))]
    [row] = found(small, VANILLA, FIXED, *between, even("prosparse_star", 12.0, 0.7, 1.0))
    assert (row["l1_below"], row["l1_above"]) == (0.1, 0.2)
    assert row["fixed_perplexity"] == pytest.approx(11 * (13 / 11) ** (0.05 / 0.07))


def test_without_any_error_there_is_no_bar(small: Ledger) -> None:
    bare = Row("prosparse_star", (12.0, 12.0), 0.7, 1.0, stderr=None)
    [row] = found(small, VANILLA, FIXED, bare)
    assert row["difference_pct"] == pytest.approx(100 * (12 / math.sqrt(200) - 1))
    assert (row["difference_stderr_pct"], row["error_source"]) == (None, None)


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
