"""The benchmarks of the paper (section 4.1, App. K): one entry each, and how names in a recipe become tasks to run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput
from tasks.evaluation.benchmark_data import Datasets, MissingData, open_datasets
from tasks.evaluation.benchmark_harness import Leaf, find_leaves, known_names

if TYPE_CHECKING:
    from prosparse_core.recipe import Evaluate

PAPER = "paper"
PPL = "acc_ppl"
"""Accuracy of the candidate with the lowest per-token perplexity, the paper's rule; the harness's ``acc`` takes the
highest summed log-likelihood, its ``acc_norm`` divides by characters."""
GREEDY = "acc_greedy"
"""Share of the questions whose right answer is what greedy decoding gives: the paper's rule for MMLU, where the model
writes a letter. The forward passes of the likelihoods tell: what it writes is the candidate whose every token is the
most likely one, if there is one."""
GENERATED_TOKENS = 256
"""At most this many tokens are generated where neither a benchmark nor the harness says otherwise."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where the harness has it, and which of its scores is the paper's."""

    name: str
    suite: str
    """The column of the paper's Table 1 it counts in."""
    harness: str
    """lm-eval's task or group."""
    folder: str
    """Where under lm-eval's tasks its files are: looking there only takes no time."""
    num_fewshot: int | None = 0
    """None: as lm-eval has it."""
    headline: str = PPL
    """The metric that is the paper's score."""
    columns: tuple[str, ...] = ()
    """What every row of its data must have, and not null."""
    runs_code: bool = False
    max_new_tokens: int | None = None
    strips: bool = False
    """Compare answers without the white space around them as well (``,strip``): lm-eval's own exact match does not,
    and is 0 where a tokenizer keeps the space between "A:" and the answer."""
    further_splits: tuple[str, ...] = ()
    """Splits its examples come from which its file does not name."""
    labels: tuple[int, ...] = ()
    """The only ones its rows may have, where the harness takes every other for one of them."""
    remark: str = ""
    """What belongs to the note of its rows: how it differs from the paper's."""


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "humaneval",
        "code",
        "humaneval",
        "humaneval",
        headline="pass@1",
        columns=("prompt", "test", "entry_point"),
        runs_code=True,
        max_new_tokens=512,
    ),
    Benchmark(
        "mbpp",
        "code",
        "mbpp",
        "mbpp",
        num_fewshot=3,
        headline="pass@1",
        columns=("task_id", "text", "code", "test_list"),
        runs_code=True,
        max_new_tokens=256,
        further_splits=("prompt",),
    ),
    Benchmark("piqa", "commonsense", "piqa", "piqa", columns=("goal", "sol1", "sol2", "label")),
    Benchmark(
        "siqa",
        "commonsense",
        "social_iqa",
        "siqa",
        columns=("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    Benchmark(
        "hellaswag",
        "commonsense",
        "hellaswag",
        "hellaswag",
        columns=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    ),
    Benchmark(
        "winogrande", "commonsense", "winogrande", "winogrande", columns=("sentence", "option1", "option2", "answer")
    ),
    Benchmark(
        "copa",
        "commonsense",
        "copa",
        "super_glue/copa",
        columns=("premise", "question", "choice1", "choice2", "label"),
        labels=(0, 1),
    ),
    Benchmark("boolq", "reading", "boolq", "super_glue/boolq", columns=("passage", "question", "label")),
    # One candidate: right when it is what greedy decoding gives.
    Benchmark("lambada", "reading", "lambada_openai", "lambada", headline="acc", columns=("text",)),
    # The gold passages in English (440 questions in the development set: the paper's figures are multiples of 1/440).
    # The paper takes the candidate of the lowest perplexity; the data have none, so its score cannot be had.
    Benchmark(
        "tydiqa",
        "reading",
        "tydiqa_goldp_en",
        "tydiqa",
        headline="exact_match",
        columns=("id", "title", "context", "question", "answers"),
        max_new_tokens=64,
        remark="the paper chooses by perplexity among candidates this data does not have",
    ),
    Benchmark(
        "gsm8k",
        "gsm8k",
        "gsm8k",
        "gsm8k",
        num_fewshot=8,
        headline="exact_match,strict-match",
        columns=("question", "answer"),
        max_new_tokens=256,
    ),
    Benchmark("mmlu", "mmlu", "mmlu", "mmlu/default", 5, headline=GREEDY, columns=("question", "choices", "answer")),
    Benchmark(
        "bbh",
        "bbh",
        "bbh_fewshot",
        "bbh/fewshot",
        num_fewshot=3,
        headline="exact_match,strip",
        columns=("input", "target"),
        max_new_tokens=128,
        strips=True,
    ),
    Benchmark("agieval", "agieval", "agieval_en", "agieval", columns=("query",)),
)
SUITES: tuple[str, ...] = tuple(dict.fromkeys(b.suite for b in BENCHMARKS))
"""The seven columns of the paper's Table 1, in its order; its average is their unweighted mean."""
GROUPS: dict[str, tuple[Benchmark, ...]] = {
    PAPER: BENCHMARKS,
    **{s: tuple(b for b in BENCHMARKS if b.suite == s) for s in SUITES if s in ("code", "commonsense", "reading")},
}


@dataclass(frozen=True)
class Planned:
    """A benchmark that is to run: its tasks with data, and what stands in the way of the others."""

    benchmark: Benchmark
    leaves: tuple[Leaf, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """Task -> why it is n/a. With no leaves there is one entry, under the benchmark's own task name."""
    data: tuple[Any, ...] = ()
    """Identity of the data, leaf by leaf."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its scores, beside the harness's version and the model."""
        # MMLU's was the likeliest letter once: only what was measured of it then is measured again.
        by_rule = {"headline": GREEDY} if self.leaves and self.benchmark.headline == GREEDY else {}
        return {
            "benchmark": self.benchmark.name,
            "num_fewshot": self.benchmark.num_fewshot,
            "max_new_tokens": self.benchmark.max_new_tokens,
            "tasks": {leaf.task: data for leaf, data in zip(self.leaves, self.data, strict=True)},
            "absent": sorted(self.absent),
            **by_rule,
        }


def plan_benchmarks(section: Evaluate) -> tuple[list[Planned], Datasets]:
    """What ``evaluate.benchmarks`` comes to, checked before any model is loaded.

    Raises:
        BadInput: an unknown name (with the nearest ones), code to be run without the opt-in although its benchmark was
            asked for by name, no such mirror folder, or data there without the columns a benchmark needs.
    """
    datasets = open_datasets(section.datasets)
    return [_plan(b, by_name, section, datasets) for b, by_name in resolve(section.benchmarks)], datasets


def resolve(names: Sequence[str]) -> list[tuple[Benchmark, bool]]:
    """Each benchmark once, in the order asked for, and whether it was asked for by its own name.

    Raises:
        BadInput: a name that is no benchmark, no group and no task of lm-eval.
    """
    found: dict[str, tuple[Benchmark, bool]] = {}
    for name in names:
        if name in GROUPS:
            for benchmark in GROUPS[name]:
                found.setdefault(benchmark.name, (benchmark, False))
        else:
            benchmark = _named(name)
            found[benchmark.name] = (benchmark, True)
    return list(found.values())


def _named(name: str) -> Benchmark:
    for benchmark in BENCHMARKS:
        if name in (benchmark.name, benchmark.harness):
            return benchmark
    every = known_names()
    if name in every:
        return Benchmark(name, name, name, every[name], num_fewshot=None, headline="")
    ours = [*GROUPS, *(b.name for b in BENCHMARKS)]
    near = difflib.get_close_matches(name, dict.fromkeys([*ours, *every]), n=3, cutoff=0.6)
    raise BadInput(
        f"evaluate.benchmarks: {name!r} is no benchmark, no group of them and no task of lm-eval",
        hint=f"did you mean {', '.join(near)}?" if near else f"ours: {', '.join(ours)}; or any task of lm-eval",
    )


def _plan(benchmark: Benchmark, by_name: bool, section: Evaluate, datasets: Datasets) -> Planned:
    leaves = find_leaves(benchmark.harness, benchmark.folder)
    if (benchmark.runs_code or any(leaf.runs_code for leaf in leaves)) and not section.run_code:
        reason = "runs code the model wrote, which evaluate.run_code does not allow"
        if by_name:
            raise BadInput(
                f"evaluate.benchmarks: {benchmark.name} {reason}",
                hint="allow it with --run-code (in a recipe evaluate.run_code: true), or leave it out",
            )
        return Planned(benchmark, absent={benchmark.harness: reason})
    if not benchmark.runs_code and any(leaf.runs_code for leaf in leaves):
        raise BadInput(
            f"evaluate.benchmarks: lm-eval's {benchmark.name} runs code in this very process: only humaneval and mbpp "
            "are run in a subprocess with limits",
            hint="leave it out",
        )
    present, data, absent = [], [], {}
    for leaf in leaves:
        try:
            data.append(datasets.identity(leaf.dataset, leaf.config, splits_of(benchmark, leaf), benchmark.columns))
            present.append(leaf)
        except MissingData as missing:
            absent[leaf.task] = str(missing)
    if not present:
        absent = in_one_row(benchmark, absent)
    return Planned(benchmark, tuple(present), absent, tuple(data))


def in_one_row(benchmark: Benchmark, absent: Mapping[str, str]) -> dict[str, str]:
    """The first reason, under the benchmark's own task, where nothing of it can be measured: MMLU would have 57."""
    return {benchmark.harness: next(iter(absent.values()))}


def splits_of(benchmark: Benchmark, leaf: Leaf) -> tuple[str, ...]:
    """The splits a task needs: the evaluated one, then those of its examples."""
    if benchmark.further_splits:
        return (*leaf.splits(0), *benchmark.further_splits)
    return leaf.splits(leaf.num_fewshot if benchmark.num_fewshot is None else benchmark.num_fewshot)


@dataclass(frozen=True)
class Average:
    """One column of the paper's Table 1, or its last one."""

    name: str
    value: float | None
    """None where nothing of it was measured; of the last column, where one of the seven is missing."""
    num_measured: int
    num_benchmarks: int


def averages(scores: Iterable[Mapping[str, Any]]) -> list[Average]:
    """The suites, each the unweighted mean of its benchmarks' headline scores, and the mean of the seven suites: none
    where a benchmark or a task of a group lacks its score.

    Args:
        scores: rows of one model with task, value and headline; those of a group's single tasks do not count.
    """
    scores = list(scores)
    by_task = {s["task"]: s["value"] for s in scores if s["headline"] and s["value"] is not None}
    found = []
    for suite in SUITES:
        members = [b for b in BENCHMARKS if b.suite == suite]
        values = [by_task[b.harness] for b in members if b.harness in by_task]
        mean = sum(values) / len(values) if values else None
        found.append(Average(suite, mean, len(values), len(members)))
    columns = [a.value for a in found if a.value is not None]
    groups = tuple(f"{b.harness.removesuffix('_en')}_" for b in BENCHMARKS)
    lacks = any(s["value"] is None and s["task"].startswith(groups) for s in scores)
    is_whole = not lacks and all(a.num_measured == a.num_benchmarks for a in found)
    whole = sum(columns) / len(columns) if is_whole else None
    return [*found, Average("average", whole, len(columns), len(SUITES))]
