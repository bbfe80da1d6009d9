"""Differences between variants: which pairs there are, on which documents, and that a rebuild makes the same."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from ledger_fixture import ask, make_artifact, record_step, start_run

from prosparse_core.errors import ProSparseError
from prosparse_core.ledger import Ledger
from prosparse_core.paired import Scored, difference

NUM = {"code": 12, "docs": 15}
SHARES = {"code": 0.75, "docs": 0.25}
SAME = {"table": "document_scores", "dtype": "fp32", "num_fewshot": 0}


def contributions(corpus: str, factor: float) -> tuple[list[float], list[float]]:
    draw = random.Random(corpus)
    counts = [float(draw.randint(50, 300)) for _ in range(NUM[corpus])]
    return [c * (draw.gauss(2.5, 0.6) + math.log(factor)) for c in counts], counts


def evaluated(home: Path, setting: str, factor: float, right: int = 12, tokens: float = 1.0, name: str = "") -> Any:
    """An evaluation on two corpora, and on two tasks of a group with 20 questions each."""
    variant = f"{setting}@{name or '0' * 8}"
    facts: list[dict[str, Any]] = [{"table": "variants", "variant": variant, "model": "m", "setting": setting}]
    for corpus in NUM:
        sums, counts = contributions(corpus, factor)
        counts = [tokens * c for c in counts]
        mean = sum(sums) / sum(counts)
        score = {"variant": variant, "corpus": corpus, "metric": "token_perplexity", "share": SHARES[corpus]}
        told = {
            "table": "evaluations",
            "value": math.exp(mean),
            "higher_is_better": False,
            "num_documents": NUM[corpus],
        }
        facts.append({**score, **told})
        facts.append({**SAME, **score, "window_tokens": 64, "documents": corpus, "sums": sums, "counts": counts})
    for task in ("bbh_fewshot_a", "bbh_fewshot_b"):
        score = {"variant": variant, "task": task, "metric": "exact_match", "part_of": "bbh_fewshot", "documents": task}
        facts.append({**SAME, **score, "sums": [1.0] * right + [0.0] * (20 - right), "counts": [1.0] * 20})
    return make_artifact(home, "evaluate", f"evaluate · {variant}", facts)


def recorded(home: Path, *artifacts: Any) -> Ledger:
    ledger = Ledger(home)
    start_run(ledger, "r", model="m")
    for artifact in artifacts:
        record_step(ledger, "r", artifact)
    ledger.end_run("r", "done")
    return ledger


def test_every_pair_on_every_corpus_together_and_by_group(tmp_path: Path) -> None:
    ledger = recorded(
        tmp_path, evaluated(tmp_path, "prosparse", 1.25, 9), evaluated(tmp_path, "original", 1.0),
        evaluated(tmp_path, "fixed_l1", 1.5),
    )  # fmt: skip
    rows = ledger.query("FROM variant_differences WHERE base_setting = 'original' AND setting = 'prosparse'").records()
    found = {r["corpus"] or r["task"]: r for r in rows}
    assert set(found) == {"code", "docs", "all", "bbh_fewshot_a", "bbh_fewshot_b", "bbh_fewshot"}
    for corpus in ("code", "docs", "all"):
        row = found[corpus]
        assert row["unit"] == "ratio"
        assert row["value"] == pytest.approx(1.25)
        assert (row["low"], row["high"]) == (pytest.approx(1.25), pytest.approx(1.25)), "the same on every document"
        assert row["num_documents"] == NUM.get(corpus, 27)
    group = found["bbh_fewshot"]
    assert (group["unit"], group["value"], group["num_documents"]) == ("fraction", pytest.approx(-0.15), 40)
    assert group["low"] < -0.15 < group["high"] < 0
    pairs = ask(ledger, "SELECT DISTINCT setting, base_setting FROM variant_differences ORDER BY ALL")
    assert len(pairs) == 6, "both ways round"
    back = ledger.query(
        "FROM variant_differences WHERE setting = 'original' AND base_setting = 'prosparse' ORDER BY corpus"
    ).records()
    assert {r["corpus"] or r["task"]: r["value"] for r in back} == pytest.approx(
        {k: 1 / r["value"] if r["unit"] == "ratio" else -r["value"] for k, r in found.items()}
    )
    board = {r["setting"]: r for r in ledger.query("FROM leaderboard").records()}
    assert board["original"]["times_original"] is None
    assert board["fixed_l1"]["times_original"] == pytest.approx(1.5)
    ratio = board["fixed_l1"]["perplexity"] / board["original"]["perplexity"]
    assert ratio == pytest.approx(1.5), "the leaderboard's perplexities and the ratio are weighed alike"
    assert board["fixed_l1"]["times_original_low"] == pytest.approx(1.5)


def test_the_interval_is_that_of_the_resampled_documents(tmp_path: Path) -> None:
    """Corpora weigh by their shares of the mixture, within each both variants get the same documents."""
    one, two = evaluated(tmp_path, "original", 1.0), evaluated(tmp_path, "prosparse", 1.3)
    lines = (two.path / "facts.jsonl").read_text()
    assert lines.count("document_scores") == 4
    ledger = recorded(tmp_path, one, two)
    sums = ledger.query("SELECT variant, corpus, sums, counts FROM document_scores WHERE corpus IS NOT NULL").records()
    by = {(r["variant"].split("@")[0], r["corpus"]): Scored(r["corpus"], r["sums"], r["counts"]) for r in sums}
    expected = difference([(by["prosparse", c], by["original", c]) for c in NUM], list(SHARES.values()))
    assert expected.high is not None
    [row] = ledger.query("FROM variant_differences WHERE corpus = 'all' AND base_setting = 'original'").records()
    assert (row["value"], row["high"]) == (
        pytest.approx(math.exp(expected.value)),
        pytest.approx(math.exp(expected.high)),
    )


def test_a_rebuild_makes_the_same_in_whatever_order(tmp_path: Path) -> None:
    made = [evaluated(tmp_path, s, f) for s, f in (("vanilla_relu", 1.4), ("original", 1.0), ("prosparse", 1.2))]
    ledger = recorded(tmp_path, *made)
    sql = "SELECT * FROM differences ORDER BY ALL"
    before = ask(ledger, sql)
    assert len(before) == 3 * 6
    assert {row[3].split("@")[0] for row in before if "original" in row[1] + row[3]} == {"original"}
    (tmp_path / "ledger.duckdb").unlink()
    for left in (tmp_path / ".ledger").glob("*.duckdb*"):
        left.unlink()
    again = Ledger(tmp_path)
    again.rebuild(tmp_path / "store")
    assert ask(again, sql) == before


def test_what_was_read_otherwise_does_not_compare(tmp_path: Path) -> None:
    other_tokens = evaluated(tmp_path, "prosparse", 1.2, tokens=1.5)
    ledger = recorded(tmp_path, evaluated(tmp_path, "original", 1.0), other_tokens)
    kinds = ask(ledger, "SELECT DISTINCT unit FROM differences")
    assert kinds == [("fraction",)], "another tokenizer: its perplexity is per other tokens, its scores do compare"


def test_contributions_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    row = {**SAME, "variant": "v@1", "corpus": "c", "metric": "m", "documents": "d", "counts": [1.0]}
    variant = {"table": "variants", "variant": "v@1", "model": "m", "setting": "s"}
    for sums in ([None], ["1"], [True]):
        made = make_artifact(tmp_path, "evaluate", f"e {sums}", [variant, {**row, "sums": sums}])
        with pytest.raises(ProSparseError, match=r"document_scores\.sums is a list of finite numbers"):
            Ledger(tmp_path).record_artifact(made.path)
