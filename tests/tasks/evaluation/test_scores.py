"""The paper's rules by hand: the answer of the lowest per-token perplexity, the letter given, the means of groups."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.evaluation.benchmarks import BENCHMARKS
from tasks.evaluation.held_out import Score
from tasks.evaluation.scores import group_scores, with_paper_rule


class Judge:
    """A multiple-choice task whose right answer is the first."""

    def process_results(self, doc: Any, results: list[tuple[float, bool]]) -> dict[str, float]:
        return {"acc": float(max(range(len(results)), key=lambda i: results[i][0]) == doc["gold"])}


def test_the_paper_s_rule_by_hand() -> None:
    """-6 over 4 tokens is a perplexity of e^1.5, -5 over 2 of e^2.5, -4.2 over 2 of e^2.1."""
    counts = {("q", " long answer here"): 4, ("q", " short"): 2, ("q", " other"): 2}
    sample = {
        "doc": {"gold": 0},
        "doc_hash": "a",
        "arguments": [("q", " long answer here"), ("q", " short"), ("q", " other")],
        "filtered_resps": [(-6.0, False), (-5.0, False), (-4.2, False)],
    }
    other = {**sample, "doc": {"gold": 2}, "doc_hash": "b"}
    harness = Score("acc", 0.5, 0.5, 2, True, task="t", headline=True)
    norm = Score("acc_norm", 1.0, 0.0, 2, True, task="t")
    ours, acc, acc_norm = with_paper_rule(Judge(), [sample, other], [harness, norm], counts, "acc_ppl")
    assert (ours.metric, ours.value, ours.stderr, ours.headline) == ("acc_ppl", 0.5, 0.5, True)
    assert (acc.headline, acc_norm.headline) == (False, False)
    assert (ours.sums, ours.counts, ours.num_documents) == ((1.0, 0.0), (1.0, 1.0), 2), "right or wrong, by question"
    assert ours.documents is not None
    assert (acc.documents, acc.sums) == (None, ()), "only of the headline"
    only_first, *_ = with_paper_rule(Judge(), [sample], [harness, norm], counts, "acc_ppl")
    assert only_first.value == 1.0, "the summed log-likelihood would have taken the third"
    kept = with_paper_rule(Judge(), [sample], [harness, norm], counts, "acc")
    assert [(s.metric, s.headline) for s in kept] == [("acc_ppl", False), ("acc", True), ("acc_norm", False)]


def test_where_nothing_of_the_choices_is_given_none_is_right() -> None:
    """Told 0 for every candidate the task would take the first, which is the right one."""
    sample = {
        "doc": {"gold": 0},
        "doc_hash": "a",
        "arguments": [("q", " A"), ("q", " B")],
        "filtered_resps": [(-2.0, False)] * 2,
    }
    acc = Score("acc", 1.0, None, 1, True, task="t", headline=True)
    found = with_paper_rule(Judge(), [sample], [acc], {("q", " A"): 1, ("q", " B"): 1}, "acc_greedy")
    assert {s.metric: (s.value, s.headline) for s in found} == {
        "acc_greedy": (0.0, True),
        "acc_ppl": (1.0, False),
        "acc": (1.0, False),
    }


def test_groups_are_means_of_their_tasks() -> None:
    (bbh,) = [b for b in BENCHMARKS if b.name == "bbh"]
    one = Score("exact_match,strip", 0.2, 0.03, 100, True, task="bbh_fewshot_a", headline=True, num_fewshot=3)
    two = Score("exact_match,strip", 0.8, 0.04, 300, True, task="bbh_fewshot_b", headline=True, num_fewshot=3)
    paper, by_question = group_scores(bbh, [one, two], {"bbh_fewshot_c": "why"})
    assert (paper.task, paper.metric, paper.headline, paper.n) == ("bbh_fewshot", "exact_match,strip", True, 400)
    assert paper.value == pytest.approx(0.5)
    assert paper.stderr == pytest.approx(0.025)
    assert paper.note == "mean of 2 of 3 tasks: without bbh_fewshot_c"
    assert (by_question.metric, by_question.headline) == ("exact_match,strip,by_question", False)
    assert by_question.value == pytest.approx(0.65)
    assert group_scores(bbh, [], {"bbh_fewshot_c": "why"}) == []
