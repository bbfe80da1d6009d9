"""Benchmarks through the harness: data from where the recipe says, checked row by row; what does not fit is n/a."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.precision import Precision
from prosparse_core.progress import Progress, Silent
from tasks.evaluation.benchmark_code import CodeRuns, code_settings
from tasks.evaluation.benchmark_data import Datasets, MissingData
from tasks.evaluation.benchmark_harness import Leaf
from tasks.evaluation.benchmark_rows import check_rows, fitting, guard
from tasks.evaluation.benchmarks import GENERATED_TOKENS, Benchmark, Planned, in_one_row, splits_of
from tasks.evaluation.evaluation import Evaluation, add_raw, harness_version
from tasks.evaluation.held_out import Score
from tasks.evaluation.parts import Part, Parts
from tasks.evaluation.scores import group_scores, harness_scores, with_paper_rule
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
            if absent and not found:
                absent = in_one_row(plan.benchmark, absent)
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
    check_rows(task, benchmark, leaf, limit)
    guard(task, leaf, limit)
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
    if benchmark.remark:
        about += f"; {benchmark.remark}"
    how: dict[str, Any] = {
        "partial": count["effective"] < count["original"],
        "note": about,
        "num_fewshot": int(task.config.num_fewshot or 0),
    }
    scores = harness_scores(results, leaf.task, headline=benchmark.headline, **how)
    if task.OUTPUT_TYPE == "multiple_choice":
        scores = with_paper_rule(task, results["samples"][leaf.task], scores, scorer.num_scored, benchmark.headline)
    if leaf.task != benchmark.harness:
        scores = [replace(s, part_of=benchmark.harness) if s.documents else s for s in scores]
    return Part(tuple(scores), raw)


def _load(benchmark: Benchmark, leaf: Leaf, datasets: Datasets, runs: CodeRuns) -> Any:
    """The task with its data; raises MissingData where the two do not fit."""
    with fitting(leaf):
        task = load_task(task_settings(benchmark, leaf, datasets, runs))
        shots = int(task.config.num_fewshot or 0)
        if shots and len(task.sampler.df) < shots:
            raise MissingData(f"dataset {leaf.dataset} has {len(task.sampler.df)} examples, {shots} are to be shown")
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
