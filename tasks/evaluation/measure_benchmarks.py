"""Benchmarks through the harness: data from where the recipe says, both scores where the paper's rule differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.precision import Precision
from prosparse_core.progress import Progress, Silent
from tasks.evaluation.benchmark_code import CodeRuns, code_settings
from tasks.evaluation.benchmark_data import Datasets, MissingData
from tasks.evaluation.benchmark_harness import Leaf
from tasks.evaluation.benchmarks import GENERATED_TOKENS, PPL, Benchmark, Planned, splits_of
from tasks.evaluation.evaluation import Evaluation, add_raw, harness_version
from tasks.evaluation.held_out import Score
from tasks.evaluation.parts import Part, Parts
from tasks.evaluation.scores import harness_scores, mean_and_error
from tasks.evaluation.scoring import evaluating, load_task, make_scorer, quiet, run_task

MAX_LENGTH = 4096
"""Tokens of context, as in the paper; fewer where the model's own end before."""


def measure_benchmarks(
    model: Any,
    tokenizer: Any,
    planned: Sequence[Planned],
    datasets: Datasets,
    *,
    precision: Precision,
    batch_size: int,
    limit: int | None = None,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> Evaluation:
    """Every benchmark of a plan; what cannot be measured is n/a with its reason, and no reason to stop.

    Args:
        limit: at most this many documents per task; marks what it cuts as partial.
        parts: what an interrupted attempt has measured is taken from there, and what is measured now is kept there.

    Raises:
        ProSparseError: the model's log-likelihoods are not finite.
        EnvironmentProblem: no subprocess can be started to run code in; data that are there cannot be had now.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit}: at least 1 document per task")
    progress, parts = progress or Silent(), parts or Parts()
    max_length = min(getattr(model.config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH)
    scores: list[Score] = []
    raw: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    total, done = sum(len(p.leaves) for p in planned), 0
    with quiet(), evaluating(model):
        scorer = make_scorer(model, tokenizer, precision=precision, batch_size=batch_size, max_length=max_length)
        for plan in planned:
            absent = dict(plan.absent)
            found: list[Part] = []
            for leaf in plan.leaves:
                scorer.on_progress = partial(_tell, progress, done, total, leaf.task)
                try:
                    measure = partial(_measure, scorer, plan.benchmark, leaf, datasets, limit)
                    found.append(parts.get(f"{plan.benchmark.name} {leaf.task}", measure))
                except MissingData as missing:
                    absent[leaf.task] = str(missing)
                done += 1
            measured = [score for part in found for score in part.scores]
            scores += measured
            scores += [_not_measured(plan.benchmark, task, reason) for task, reason in absent.items()]
            if any(leaf.task != plan.benchmark.harness for leaf in plan.leaves):
                scores += group_scores(plan.benchmark, measured, absent)
            seconds[plan.benchmark.name] = round(sum(part.seconds for part in found), 1)
            add_raw(raw, *(part.raw for part in found))
    conditions = {
        "precision": precision,
        "batch_size": batch_size,
        "benchmark_max_length": max_length,
        "prefix": scorer.prefix,
        "limit": limit,
        "harness_version": harness_version(),
    }
    return Evaluation(tuple(scores), {}, conditions, raw, seconds)


def _tell(progress: Progress, done: int, total: int, task: str, share: float) -> None:
    progress.update(done + share, total, task=task)


def _measure(scorer: Any, benchmark: Benchmark, leaf: Leaf, datasets: Datasets, limit: int | None) -> Part:
    runs = CodeRuns()
    raw: dict[str, dict[str, Any]] = {}
    task = _load(benchmark, leaf, datasets, runs)
    scorer.num_truncated = 0
    results = run_task(scorer, task, limit, raw)
    (count,) = (results["n-samples"][leaf.task],)
    about = f"prefix {scorer.prefix} ({scorer.prefix_kind}), windows of {scorer.max_length} tokens"
    if task.OUTPUT_TYPE == "generate_until":
        about += f"; greedy, at most {task.config.generation_kwargs['max_gen_toks']} tokens"
    if scorer.num_truncated:
        about += f"; {scorer.num_truncated} prompts were too long and lost their beginning"
    if benchmark.runs_code:
        about += f"; {runs.note}"
    how: dict[str, Any] = {
        "partial": count["effective"] < count["original"],
        "note": about,
        "num_fewshot": int(task.config.num_fewshot or 0),
    }
    scores = harness_scores(results, leaf.task, headline=benchmark.headline, **how)
    if task.OUTPUT_TYPE == "multiple_choice":
        scores = with_paper_rule(task, results["samples"][leaf.task], scores, scorer.num_scored, benchmark.headline)
    return Part(tuple(scores), raw)


def _load(benchmark: Benchmark, leaf: Leaf, datasets: Datasets, runs: CodeRuns) -> Any:
    """The task with its data; raises MissingData where the two do not fit."""
    try:
        task = load_task(task_settings(benchmark, leaf, datasets, runs))
        shots = int(task.config.num_fewshot or 0)
        if shots and len(task.sampler.df) < shots:
            raise MissingData(f"dataset {leaf.dataset} has {len(task.sampler.df)} examples, {shots} are to be shown")
    except (ProSparseError, MissingData, OSError):  # a full disk or a broken connection is no property of the data
        raise
    except Exception as error:
        # Whatever its templates and functions make of data that are not as they expect.
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MissingData(f"dataset {leaf.dataset} does not fit lm-eval's {leaf.task}: {said}") from error
    return task


def task_settings(benchmark: Benchmark, leaf: Leaf, datasets: Datasets, runs: CodeRuns) -> dict[str, Any]:
    """What the harness is given: its own file, with data, number of examples and length of answers settled by us."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if benchmark.runs_code:
        settings = code_settings(leaf.task, dict(leaf.settings), runs)
    else:
        settings = {**load_yaml(leaf.path, resolve_func=True), **leaf.overrides}
    shots = leaf.num_fewshot if benchmark.num_fewshot is None else benchmark.num_fewshot
    if not shots:  # the harness would look for examples all the same
        settings = {k: v for k, v in settings.items() if k not in ("training_split", "fewshot_split", "fewshot_config")}
    if settings.get("output_type", "generate_until") == "generate_until":
        given: Mapping[str, Any] = settings.get("generation_kwargs") or {}
        settings["generation_kwargs"] = {
            "until": [settings.get("fewshot_delimiter", "\n\n")],
            **given,
            "max_gen_toks": benchmark.max_new_tokens or given.get("max_gen_toks") or GENERATED_TOKENS,
        }
    if benchmark.strips:
        first = {"function": "take_first"}
        stripped = {"name": "strip", "filter": [{"function": "remove_whitespace"}, first]}
        settings["filter_list"] = [{"name": "none", "filter": [first]}, stripped]
    splits = splits_of(benchmark, leaf)
    if settings.get("test_split") and settings.get("validation_split") not in splits:
        settings.pop("validation_split", None)  # not read: the harness would look there for examples, too

    def load(**_: Any) -> dict[str, Any]:
        return datasets.load(leaf.dataset, leaf.config, splits)

    return {**settings, "task": leaf.task, "num_fewshot": shots, "custom_dataset": load, "dataset_kwargs": None}


def with_paper_rule(
    task: Any,
    samples: Sequence[Mapping[str, Any]],
    scores: Sequence[Score],
    num_tokens: Mapping[tuple[str, ...], int],
    headline: str,
) -> list[Score]:
    """Beside the harness's accuracies, that of the candidate with the lowest per-token perplexity (paper, App. K).

    exp(-ll / tokens) is lowest where ll / tokens is highest: the task itself judges, told these in place of its sums.
    """
    harness = next((s for s in scores if s.metric == "acc"), None)
    if harness is None:
        return list(scores)
    right = []
    for sample in samples:
        answers = zip(sample["arguments"], sample["filtered_resps"], strict=True)
        means = [(float(ll) / max(1, num_tokens[tuple(pair)]), greedy) for pair, (ll, greedy) in answers]
        right.append(float(task.process_results(sample["doc"], means)["acc"]))
    value, stderr = mean_and_error(right)
    is_first = headline == PPL
    ours = replace(harness, metric=PPL, value=value, stderr=stderr, headline=is_first)
    return [ours, *(replace(s, headline=s.headline and not is_first) for s in scores)]


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
            )
        )
    return found


def _pooled(errors: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(w * e) ** 2 for e, w in zip(errors, weights, strict=True) if e is not None]
    return sum(known) ** 0.5 if len(known) == len(errors) else None


def _not_measured(benchmark: Benchmark, task: str, reason: str) -> Score:
    return Score(
        benchmark.headline or "acc",
        None,
        None,
        n=0,
        higher_is_better=True,
        task=task,
        headline=True,
        note=reason,
        num_fewshot=benchmark.num_fewshot or 0,
    )
