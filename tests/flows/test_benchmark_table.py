"""The table of benchmarks: the paper's order and averages, reasons in place of numbers."""

from __future__ import annotations

from typing import Any

from flows.benchmark_table import benchmark_table
from tasks.evaluation.benchmarks import BENCHMARKS


def row(task: str, value: float | None, metric: str = "acc_ppl", **more: Any) -> dict[str, Any]:
    return {
        "task": task, "value": value, "metric": metric, "stderr": None, "n": 10, "num_fewshot": 0, "headline": True,
        "partial": False, "note": None, "higher_is_better": True, **more,
    }  # fmt: skip


def test_one_variant_with_its_other_scores() -> None:
    scores = [
        row("arc_easy", 0.25, "acc"),
        row("piqa", 0.6, stderr=0.05, partial=True),
        row("piqa", 0.7, "acc", headline=False),
        row("lambada_openai", 0.5, "acc"),
        row("lambada_openai", 12.345, "perplexity", headline=False, higher_is_better=False),
        row("copa", None, note="dataset aps/super_glue not found in here"),
        row("bbh_fewshot", 0.3, "exact_match", num_fewshot=3, note="mean of 2 of 27 tasks: without many"),
        row("bbh_fewshot_snarks", 0.3, "exact_match", num_fewshot=3),
    ]
    columns, rows = benchmark_table({"original": scores})
    assert columns == ["benchmark", "shots", "score", "original", "also"]
    assert rows == [
        ["piqa", 0, "acc_ppl", "60.00 ± 5.00 % (n=10, partial)", "acc 70.00 %"],
        ["copa", 0, "acc_ppl", "n/a: dataset aps/super_glue not found in here", ""],
        ["lambada", 0, "acc", "50.00 %", "perplexity 12.35"],
        ["bbh", 3, "exact_match", "30.00 % (2 of 27 tasks)", ""],
        ["arc_easy", 0, "acc", "25.00 %", ""],
        ["mean: commonsense", "", "", "60.00 % (1 of 5, partial)", ""],
        ["mean: reading", "", "", "50.00 % (1 of 3)", ""],
        ["mean: average", "", "", "n/a", ""],
    ]


def test_variants_side_by_side() -> None:
    both = {"original": [row("piqa", 0.6)], "prosparse": [row("piqa", 0.5), row("copa", 0.8)]}
    columns, rows = benchmark_table(both)
    assert columns == ["benchmark", "shots", "score", "original", "prosparse"]
    assert rows[:2] == [
        ["piqa", 0, "acc_ppl", "60.00 %", "50.00 %"],
        ["copa", 0, "acc_ppl", "n/a: not asked for", "80.00 %"],
    ]
    assert rows[2] == ["mean: commonsense", "", "", "60.00 % (1 of 5)", "65.00 % (2 of 5)"]


def test_the_average_is_that_of_everything() -> None:
    """All fourteen: a cut one makes it partial, a task of a group that is n/a makes it n/a."""
    rows = [row(b.harness, 0.5) for b in BENCHMARKS]
    rows[0]["partial"] = True
    _, found = benchmark_table({"original": rows})
    assert found[-4:] == [
        ["mean: code", "", "", "50.00 % (partial)", ""],
        ["mean: commonsense", "", "", "50.00 %", ""],
        ["mean: reading", "", "", "50.00 %", ""],
        ["mean: average", "", "", "50.00 % (partial)", ""],
    ]
    _, found = benchmark_table({"original": [*rows, row("mmlu_anatomy", None, note="not there")]})
    assert found[-1] == ["mean: average", "", "", "n/a", ""]
