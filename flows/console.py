"""Every rich table and progress line. A live bar on a terminal, plain lines when piped, JSON when asked."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows import summary
from flows.benchmark_table import benchmark_table
from flows.plan_table import cost_rows, memory_rows, stage_rows, verdict
from prosparse_core.planning.cost import Cost
from prosparse_core.progress import Silent
from prosparse_core.recipe import Recipe
from tasks.step import Outcome, Run

log = logging.getLogger("prosparse")
PIPED_WIDTH = 240
"""Columns where there is no terminal to ask: a table in a log is not folded."""
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
PLAIN_EVERY_S = 5.0
MARKS = {
    "done": "[green]✓[/]",
    "cached": "[cyan]=[/]",
    "failed": "[red]✗[/]",
    "would run": "[yellow]·[/]",
    "dropped": "[dim]-[/]",
}


def say(text: str) -> None:
    """One line for people; never part of the machine's output."""
    err.print(escape(text))


def print_json(value: Any) -> None:
    """The machine's output: one JSON value on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n")


def print_error(message: str, hint: str | None) -> None:
    err.print(f"[red]error:[/] {escape(message)}")
    if hint:
        err.print(f"[yellow]hint:[/] {escape(hint)}")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on standard output; numbers to the right, missing values as n/a."""
    grid = Table(title=title, box=box.SIMPLE_HEAD if out.is_terminal else box.ASCII2, title_justify="left")
    for i, column in enumerate(columns):
        numeric = any(isinstance(r[i], int | float) and not isinstance(r[i], bool) for r in rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(show(cell)) for cell in row))
    out.print(grid)


def show(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)


class NoWatcher:
    """Nobody looks on."""

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Silent]:
        yield Silent()

    def outcome(self, label: str, outcome: Outcome, detail: str = "") -> None:
        pass


def watcher() -> LiveWatcher | PlainWatcher:
    """A live bar on a terminal, plain lines otherwise."""
    return LiveWatcher() if err.is_terminal else PlainWatcher()


class _Reporting:
    """Shared by both watchers: the line that closes a step."""

    def outcome(self, label: str, outcome: Outcome, detail: str = "") -> None:
        rest = f"  {detail}" if detail else ""
        err.print(f"{MARKS.get(outcome, ' ')} {escape(label)}  [dim]{outcome}{escape(rest)}[/]")
        log.info("%s: %s%s", label, outcome, rest)


class LiveWatcher(_Reporting):
    """One bar per running step with its figures and the time left."""

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[_LiveProgress]:
        columns: list[ProgressColumn] = [
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            _TimeLeft(),
        ]
        bars = _Bars(*columns, console=err, transient=True, refresh_per_second=4)
        bars.label = label
        with bars:
            yield _LiveProgress(bars, bars.add_task("", total=None, shown="", eta=None))


class _Bars(Progress):
    """Three lines: the label, the bar, its figures; cut to the terminal instead of folded."""

    label = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield Text(self.label, style="bold", no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields.get("shown", ""), style="cyan", no_wrap=True, overflow="ellipsis")


class _LiveProgress:
    def __init__(self, bars: Progress, task: Any) -> None:
        self._bars, self._task = bars, task
        self._eta = _Eta()

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        self._bars.update(self._task, completed=done, total=total, shown=_line(fields), eta=self._eta(done, total))

    def note(self, text: str) -> None:
        err.print(f"  [dim]{escape(text)}[/]")
        log.info("%s", text)


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        eta = task.fields.get("eta")
        return Text("" if eta is None else f"left {_clock(eta)}", style="magenta")


class PlainWatcher(_Reporting):
    """Plain lines, at most one every few seconds: for pipes, logs and workers."""

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[_PlainProgress]:
        err.print(f"> {escape(label)}")
        yield _PlainProgress(label)


class _PlainProgress:
    def __init__(self, label: str) -> None:
        self._label, self._last, self._eta = label, 0.0, _Eta()

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        left = self._eta(done, total)
        now = time.monotonic()
        if now - self._last < PLAIN_EVERY_S and done < total:
            return
        self._last = now
        shown = f"  {_line(fields)}" if fields else ""
        eta = f"  left {_clock(left)}" if left else ""
        err.print(escape(f"  {100 * done / max(total, 1e-9):3.0f}%{shown}{eta}"))

    def note(self, text: str) -> None:
        err.print(escape(f"  {text}"))
        log.info("%s", text)


class _Eta:
    """Seconds left, by the pace since this process began the step (a resumed step starts in the middle)."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def __call__(self, done: float, total: float) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        began, at = self._first
        return (total - done) * (now - began) / (done - at) if done > at else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(fields: Mapping[str, float | int | str]) -> str:
    return "  ".join(f"{k} {show(v)}" for k, v in fields.items())


def run_started(run: Run) -> None:
    err.print(f"[bold]{escape(run.recipe.name)}[/]  run {run.run_id}  home {run.home}")


def only_json() -> None:
    """Send what is for people to standard error: standard output is the machine's."""
    global out
    out = err


def run_finished(run: Run) -> None:
    """What came out: the settings side by side, the predictor, the speed-ups, and where everything lies."""
    result = summary.of_run(run)
    summary.save(result, run.home)
    print_result(result)


def print_plan(recipe: Recipe, run: Run, cost: Cost | None) -> None:
    """What would run and why, and what it costs."""
    rows = []
    for label, artifact, outcome in run.history:
        place = str(artifact.folder) if artifact and artifact.folder else run.reasons.get(label, "")
        rows.append([label, outcome, place])
    table(["step", "would be", "why / where"], rows, title=f"{recipe.name} · {recipe.description}")
    if cost is None:
        say("cost: n/a until the model is here (give model.shape in the recipe to estimate it before)")
        return
    table(["stage", "steps", "ramp", "lambda at its end", "lr", "corpora", "tokens, accumulated"], stage_rows(cost))
    table(["cost", "estimate"], cost_rows(cost))
    what = "rank" if cost.layout.world > 1 else "process"
    table([f"memory of a {what}", "estimate"], memory_rows(cost), title=f"fullest when {cost.memory.moment}")
    out.print(escape(verdict(cost)), style=None if cost.fit.fits else "red")


def print_not_checked(lines: Iterable[str]) -> None:
    """What no check without a network can tell, a line each."""
    for line in lines:
        out.print(escape(f"not checked: {line}"), soft_wrap=True)


def print_result(result: summary.Result) -> None:
    """The closing table of a run and the lines below it."""
    if result.settings and (result.corpora or not result.benchmarks):
        columns = ["setting", *result.corpora, "accuracy", "threshold"]
        rows = [
            [s.label, *(_both(s, c) for c in result.corpora), _pct(s.accuracy), s.threshold_text]
            for s in result.settings
        ]
        read = f" (spans of documents, windows of {result.window_tokens} tokens)" if result.window_tokens else ""
        title = f"{result.recipe} · {result.model} · held-out files{read}: token perplexity, sparsity"
        table(columns, rows, title=title)
    if result.benchmarks:
        columns, rows = benchmark_table(result.benchmarks)
        table(columns, rows, title=f"{result.recipe} · {result.model} · benchmarks")
    for line in result.lines:
        out.print(escape(line))


def _pct(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _both(setting: summary.SettingResult, corpus: str) -> str:
    return f"{show(setting.perplexity.get(corpus))}  {_pct(setting.sparsity.get(corpus)) or 'n/a'}"
