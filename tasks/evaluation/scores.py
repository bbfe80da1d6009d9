"""The harness's numbers as scores of ours: standard errors where there is a formula, the paper's rules, groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.evaluation.benchmarks import GREEDY, PPL, Benchmark
from tasks.evaluation.held_out import Score, digest_of

NO_DOCUMENTS: dict[str, Any] = {"documents": None, "sums": (), "counts": (), "part_of": None}


def harness_scores(
    results: dict[str, Any], task: str, *, headline: str, partial: bool, note: str, num_fewshot: int = 0
) -> list[Score]:
    """Every metric of a task as the harness computed it, with a standard error where there is a formula for one.

    Args:
        headline: the metric that is reported first; where the task has no such metric, ``acc``.
    """
    result, samples = results["results"][task], results["samples"][task]
    higher = results["higher_is_better"].get(task, {})
    keys = [key for key in result if "," in key and "_stderr," not in key]
    names = {key: key.removesuffix(",none") for key in keys}
    first = headline if headline in names.values() else "acc"
    scores = []
    for key, name in names.items():
        metric, _, filter_ = key.rpartition(",")
        items = [sample[metric] for sample in samples if sample["filter"] == filter_ and metric in sample]
        value = float(result[key])
        known = math.isfinite(value)
        error = _harness_error(metric, value, items) if known else None
        scores.append(
            Score(
                name,
                value if known else None,
                error,
                n=len(items),
                higher_is_better=bool(higher.get(metric, True)),
                task=task,
                headline=name == first,
                partial=partial,
                note=note if known else f"not a finite number; {note}",
                num_fewshot=num_fewshot,
                **(_contributions(samples, filter_, items) if name == first and _is_mean(value, items) else {}),
            )
        )
    return scores


def _is_mean(value: float, items: Sequence[Any]) -> bool:
    if not items or not all(isinstance(item, int | float) for item in items):
        return False
    return math.isclose(math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12)


def _contributions(samples: Sequence[Mapping[str, Any]], filter_: str | None, each: Sequence[float]) -> dict[str, Any]:
    """What each question contributes to a score that is their mean."""
    read = [str(s["doc_hash"]) for s in samples if filter_ is None or s["filter"] == filter_]
    if len(read) != len(each):
        return {}
    return {
        "documents": digest_of(read),
        "sums": tuple(map(float, each)),
        "counts": (1.0,) * len(each),
        "num_documents": len(each),
    }


def _harness_error(metric: str, value: float, items: Sequence[Any]) -> float | None:
    """Standard error of a mean; of ``perplexity``, exp of minus a mean, by the delta method; None for anything else."""
    if not all(isinstance(item, int | float) for item in items):
        return None
    mean, stderr = mean_and_error([float(item) for item in items])
    if metric == "perplexity":
        return None if stderr is None else value * stderr
    return stderr if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, s / sqrt(n) with s over n - 1; one value has none."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def with_paper_rule(
    task: Any,
    samples: Sequence[Mapping[str, Any]],
    scores: Sequence[Score],
    num_tokens: Mapping[tuple[str, ...], int],
    headline: str,
) -> list[Score]:
    """Beside the harness's accuracies those by the paper's rules (App. K): the candidate with the lowest per-token
    perplexity and, where that is the headline, the answer greedy decoding gives.

    Either way the task itself judges, told other numbers in place of the sums: exp(-ll / tokens) is lowest where
    ll / tokens is highest, and 1 is for the candidate whose every token is the most likely one.
    """
    harness = next((s for s in scores if s.metric == "acc"), None)
    if harness is None:
        return list(scores)

    def judge(sample: Mapping[str, Any], told: Sequence[tuple[float, bool]]) -> float:
        return float(task.process_results(sample["doc"], told)["acc"])

    def per_token(sample: Mapping[str, Any]) -> list[tuple[float, bool]]:
        answers = zip(sample["arguments"], sample["filtered_resps"], strict=True)
        return [(float(ll) / max(1, num_tokens[tuple(pair)]), greedy) for pair, (ll, greedy) in answers]

    def as_given(sample: Mapping[str, Any]) -> list[tuple[float, bool]]:
        return [(float(greedy), greedy) for _, greedy in sample["filtered_resps"]]

    right = {PPL: [judge(sample, per_token(sample)) for sample in samples]}
    if headline == GREEDY:  # where none is given the likeliest is the first
        right[GREEDY] = [judge(s, as_given(s)) * any(greedy for _, greedy in s["filtered_resps"]) for s in samples]
    ours = []
    for metric, each in right.items():
        value, stderr = mean_and_error(each)
        is_first = metric == headline
        own = {**NO_DOCUMENTS, **(_contributions(samples, None, each) if is_first else {})}
        ours.append(replace(harness, metric=metric, value=value, stderr=stderr, headline=is_first, **own))
    if headline in right:
        scores = [replace(s, headline=False, **NO_DOCUMENTS) for s in scores]
    return [*ours, *scores]


def group_scores(benchmark: Benchmark, measured: Sequence[Score], absent: Mapping[str, str]) -> list[Score]:
    """A group's scores from its tasks': the mean of their headline scores, each counting alike, as the paper's average
    of averages; and for every metric that all of them have, the harness's mean by number of questions.
    """
    if not measured:
        return []
    first = [s for s in measured if s.headline and s.value is not None]
    tasks = list(dict.fromkeys(s.task for s in measured))
    note = f"mean of {len(tasks)} tasks"
    if absent:
        note = f"mean of {len(tasks)} of {len(tasks) + len(absent)} tasks: without {', '.join(absent)}"
    found = []
    if first and benchmark.headline:
        values = [s.value for s in first if s.value is not None]
        errors = [s.stderr for s in first]
        found.append(
            replace(
                first[0],
                metric=benchmark.headline,
                task=benchmark.harness,
                value=sum(values) / len(values),
                stderr=_pooled(errors, [1 / len(first)] * len(first)),
                n=sum(s.n for s in first),
                partial=any(s.partial for s in first),
                note=note,
                num_documents=sum(s.num_documents or 0 for s in first) or None,
                **NO_DOCUMENTS,
            )
        )
    for metric in dict.fromkeys(s.metric for s in measured):
        alike = [s for s in measured if s.metric == metric and s.value is not None]
        count = sum(s.n for s in alike)
        if len(alike) < len(tasks) or not count:
            continue
        weights = [s.n / count for s in alike]
        found.append(
            replace(
                alike[0],
                metric=f"{metric},by_question",
                task=benchmark.harness,
                value=sum(w * s.value for w, s in zip(weights, alike, strict=True) if s.value is not None),
                stderr=_pooled([s.stderr for s in alike], weights),
                n=count,
                headline=False,
                partial=any(s.partial for s in alike),
                note=f"{note}, weighted by their questions",
                **NO_DOCUMENTS,
            )
        )
    return found


def _pooled(errors: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(w * e) ** 2 for e, w in zip(errors, weights, strict=True) if e is not None]
    return sum(known) ** 0.5 if len(known) == len(errors) else None
