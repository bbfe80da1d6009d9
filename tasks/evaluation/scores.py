"""The harness's numbers as scores of ours, with standard errors where there is a formula for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tasks.evaluation.held_out import Score


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
        scores.append(
            Score(
                name,
                value if known else None,
                _harness_error(metric, value, items) if known else None,
                n=len(items),
                higher_is_better=bool(higher.get(metric, True)),
                task=task,
                headline=name == first,
                partial=partial,
                note=note if known else f"not a finite number; {note}",
                num_fewshot=num_fewshot,
            )
        )
    return scores


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
