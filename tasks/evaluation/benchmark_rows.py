"""Rows of a benchmark that do not fit its task: told before the model is asked anything, each with its reason."""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prosparse_core.errors import ProSparseError
from tasks.evaluation.benchmark_data import MissingData
from tasks.evaluation.benchmark_harness import Leaf
from tasks.evaluation.benchmarks import Benchmark

BARE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
"""A column that a template puts out as it is."""


class Misfit(Exception):
    """What a row lacks; becomes MissingData with the row's number."""


@contextlib.contextmanager
def fitting(leaf: Leaf, where: str = "") -> Iterator[None]:
    """MissingData is what a task's templates and functions make of data that are not as they expect."""
    try:
        yield
    except (ProSparseError, MissingData, OSError, MemoryError):  # no property of the data: a full disk, for example
        raise
    except Exception as error:
        said = str(error) if isinstance(error, Misfit) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise MissingData(f"dataset {leaf.dataset} does not fit lm-eval's {leaf.task}: {where}{said}") from error


def check_rows(task: Any, benchmark: Benchmark, leaf: Leaf, limit: int | None) -> None:
    """Read all that is to be asked, and the examples, before the model is asked anything: the harness counts as wrong
    where the right answer is none of the choices, and fails on other rows only after every answer.

    Raises:
        MissingData: the first row that does not fit, by its number among those evaluated, from 0.
    """
    for number, row in enumerate(itertools.islice(task.task_docs, limit)):
        with fitting(leaf, f"row {number}: "):
            _check_row(task, benchmark, row, task.config)
    for number, row in enumerate(task.sampler.df if task.config.num_fewshot else []):
        with fitting(leaf, f"example {number}: "):
            _check_row(task, benchmark, row, task.fewshot_cfg)


def _check_row(task: Any, benchmark: Benchmark, row: Mapping[str, Any], form: Any) -> None:
    """Raises Misfit where a column is empty that must not be, or where the right answer is none.

    Args:
        form: ``doc_to_text``, ``doc_to_target`` and ``doc_to_choice``: how the row is read. Rendering a template takes
            the harness a millisecond.
    """
    target = form.doc_to_target
    answers = _columns(task, target)
    for column in dict.fromkeys([*benchmark.columns, *answers, *_columns(task, form.doc_to_choice)]):
        value = row.get(column, "?")
        if value is None or (isinstance(value, list) and None in value):
            raise Misfit(f"its {column} {'is' if value is None else 'holds'} null")
        if value == [] or (column in answers and not str(value).strip()):
            raise Misfit(f"its {column} is empty")
    if benchmark.labels and row["label"] not in benchmark.labels:
        raise Misfit(f"its label is {row['label']!r}, not one of {', '.join(map(str, benchmark.labels))}")
    if task.OUTPUT_TYPE == "multiple_choice":
        answer = task.doc_to_text(row, form.doc_to_text) if task.multiple_input else task.doc_to_target(row, target)
        _check_answer(task, row, answer, task.doc_to_choice(row, form.doc_to_choice))
    elif task.OUTPUT_TYPE == "loglikelihood" and not task.doc_to_target(row, target).strip():
        raise Misfit("its answer is empty")


def _columns(task: Any, template: Any) -> list[str]:
    """The columns that a template puts out as they are: of null it makes the word None."""
    if not isinstance(template, str):
        return []
    return [template] if template in task.features else BARE.findall(template)


def _check_answer(task: Any, row: Mapping[str, Any], answer: Any, choices: Any) -> None:
    """Raises Misfit where a right answer (a choice, its number, or a list of them) is none of the choices."""
    if isinstance(choices, str) or not all(isinstance(choice, str) and choice for choice in choices):
        raise Misfit(f"one of its choices is empty or no text: {reprlib.repr(choices)}")
    answers = answer if isinstance(answer, list) else [answer]
    if task.config.process_results is None:
        fits = isinstance(answer, list) == bool(task.multiple_target) and all(_is_choice(a, choices) for a in answers)
    else:  # to a function of its own the answer may be a word, and not every number a choice
        task.process_results(row, [(-1.0, False)] * len(choices))
        numbers = [a for a in answers if not isinstance(a, str)]
        fits = not numbers or any(_is_choice(a, choices) for a in numbers)
    if not fits:
        raise Misfit(f"its answer {reprlib.repr(answer)} is not among its {len(choices)} choices")


def _is_choice(answer: Any, choices: Sequence[str]) -> bool:
    return answer in choices if isinstance(answer, str) else 0 <= operator.index(answer) < len(choices)


def guard(task: Any, leaf: Leaf, limit: int | None) -> None:
    """Of this task, what cannot be built or judged becomes MissingData; what the model raises in between does not."""

    def guarded(function: Any) -> Any:
        rows = itertools.cycle(range(len(task.task_docs))[:limit])  # asked in this order; answers, filter by filter

        def ask(*args: Any, **how: Any) -> Any:
            with fitting(leaf, f"row {next(rows)}: "):
                return function(*args, **how)

        return ask

    for name in ("doc_to_prefix", "fewshot_context", "construct_requests", "process_results"):
        setattr(task, name, guarded(getattr(task, name)))
