"""The results page: what a comparison of settings came to, as Markdown with its figures, for the documentation; and the
page of evaluations beside each other.

Every number is read from the ledger's views; the same ledger gives the same bytes.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.ledger import Ledger
from prosparse_core.report import benchmarks, tables, tables_claim, tables_compare
from prosparse_core.report.conditions import conditions, limits
from prosparse_core.report.data import ReportData, collect
from prosparse_core.report.format import SPACE
from prosparse_core.report.grid import Grid, escaped
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_comparison import comparison
from prosparse_core.report.plot_courses import course, courses
from prosparse_core.report.plot_tradeoff import tradeoff
from prosparse_core.report.sheet import PAPER

PAGE, FIGURES = "results.md", "results"
BENCHMARKS_PAGE = "benchmarks.md"
EVALUATE = "evaluate"
"""The flow that measures a checkpoint without training."""
MATCHED = (
    "In each line one arm was measured at that sparsity, and the other is read between its two nearest points of the "
    "same seed, ln(perplexity) taken as linear in sparsity; plain ReLU is the factor 0 of both. Differences are "
    "of the setting to the fixed factor, seed by seed, and the interval is Student's t over the seeds."
)
_OWN = re.compile(r"(comparison|courses|course(-\d+)?|thresholds)\.svg")
"""What an earlier page may have left; other files in the folder are not ours."""
_PADDING = 16
_RUNS = 'prosparse query "SELECT run_id, flow, recipe, status FROM runs"'
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"


def write_results(ledger: Ledger, run_ids: Sequence[str], folder: Path) -> list[Path]:
    """Write ``results.md`` and ``results/*.svg`` under ``folder``, or for evaluations alone ``benchmarks.md``; returns
    what was written, the page first.

    Figures and page are complete before any of them takes its place, and the page goes last: a failure leaves the old
    page with figures it can stand on.

    Args:
        run_ids: one run of the flow ``compare``; others, such as a long run of the main path, add their curves, and
            evaluations their benchmarks. Empty: the newest finished comparison.

    Raises:
        BadInput: no such run, no comparison among them, or more than one; evaluations that do not compare.
        EnvironmentProblem: ``folder`` cannot be written.
    """
    ids = list(run_ids) or [_newest_comparison(ledger)]
    flows = dict(ledger.query("SELECT run_id, flow FROM runs").rows)
    unknown = [run_id for run_id in ids if run_id not in flows]
    if unknown:
        raise BadInput(f"no run {unknown[0]!r} in {ledger.path}", hint=_RUNS)
    if all(flows[run_id] == EVALUATE for run_id in ids):
        return _replace(folder, BENCHMARKS_PAGE, benchmarks.page([collect(ledger, run_id) for run_id in ids]), {})
    num_comparisons = sum(flows[run_id] == "compare" for run_id in ids)
    if num_comparisons != 1:
        raise BadInput(
            f"{num_comparisons} of the {len(ids)} runs given are comparisons: the results page is about one",
            hint=_RUNS,
        )
    found = sorted((collect(ledger, run_id) for run_id in ids), key=lambda data: not data.is_comparison)
    text, figures = page(found[0], found[1:])
    return _replace(folder, PAGE, text, figures)


def _newest_comparison(ledger: Ledger) -> str:
    sql = "SELECT run_id FROM runs WHERE flow = 'compare' AND status = 'done' ORDER BY started_at DESC LIMIT 1"
    rows = ledger.query(sql).rows
    if not rows:
        raise BadInput("no finished comparison in the ledger", hint="prosparse compare RECIPE")
    return str(rows[0][0])


def page(data: ReportData, others: Sequence[ReportData] = ()) -> tuple[str, dict[str, str]]:
    """(Markdown, SVG by file name) of a comparison and of the runs that go with it."""
    figures: dict[str, str] = {}
    runs = [data, *others]

    def figure(plot: Plot, name: str) -> str:
        if not plot.paint:
            return f"n/a: {escaped(plot.missing)}."
        figures[f"{name}.svg"] = standalone(plot.wide)
        aid = escaped(" ".join([plot.aid, *plot.remarks]))
        return f"![{escaped(plot.alt)}]({FIGURES}/{name}.svg)\n\n{aid}"

    def table(grid: Grid | None, absent: str) -> str:
        return _table(grid) if grid is not None else f"n/a: {escaped(absent)}."

    parts = [
        f"# Results: {escaped(data.model)}",
        f"Generated from the ledger by `prosparse report --markdown`: change the runs, not this page. "
        f"{escaped(str(data.recipe.get('description') or ''))}".rstrip(),
        "## What was found",
        escaped(tables_claim.verdict(data)),
        "\n".join(f"- {escaped(line)}" for line in tables_claim.caveats(data)),
        figure(comparison(data), "comparison"),
        "## Every setting, and the tokens it saw",
        _table(tables_compare.comparison(data)),
        "## Progressive against fixed factors",
        MATCHED,
        table(_if_any(tables_claim.matched(data)), "no progressive setting was measured in this run"),
        "The paper's own numbers on this, accuracies instead of perplexities, each from one training run:",
        _table(tables_compare.printed(data)),
        "## Training",
        figure(courses(data), "courses"),
    ]
    evaluations = [other for other in others if other.run["flow"] == EVALUATE]
    for number, other in enumerate((other for other in others if other not in evaluations), start=1):
        parts += [
            f"## The run of {escaped(str(other.run['recipe']))}",
            figure(course(other), "course" if number == 1 else f"course-{number}"),
            _table(tables.results(other)),
        ]
    parts += [
        "## One threshold for all layers, or one per layer",
        figure(tradeoff(data), "thresholds"),
        table(tables_compare.rules(data), data.why_missing("calibrate")),
        *(["## Benchmarks", _table(benchmarks.scores(evaluations))] if evaluations else []),
        "## Beside the paper",
        table(tables_compare.paper(data), "the paper has none of the settings that this run measured"),
        "## Corpus by corpus",
        _table(tables.results(data)),
        "## Conditions",
        _table(conditions(runs)),
        "## Limits",
        "\n".join(f"- {escaped(line)}" for line in limits(runs)),
        "## How to reproduce this",
        _fenced("\n".join(commands(runs)), "sh"),
    ]
    return "\n\n".join(parts).replace(SPACE, " ") + "\n", figures


def commands(runs: Sequence[ReportData]) -> list[str]:
    """The commands that make the runs, this page, and the questions behind its tables."""
    lines = []
    for data in runs:
        if data.run["flow"] == EVALUATE:
            lines.append(benchmarks.command(data))
            continue
        verb = "compare" if data.is_comparison else "run"
        changes = [word for change in data.run["overrides"] or [] for word in ("--set", str(change))]
        lines.append(shlex.join(["prosparse", verb, str(data.run["recipe"]), *changes]))
    ids = [str(data.run["run_id"]) for data in runs]
    lines.append(shlex.join(["prosparse", "report", *ids, "--markdown", "docs"]))
    views = ("comparison", "matched_sparsity", "leaderboard", "paper_gap")
    return lines + [_query(f"FROM {view} WHERE run_id = ", ids[0]) for view in views]


def _query(sql: str, run_id: str) -> str:
    if re.fullmatch(r"[\w.-]+", run_id):
        return f"prosparse query \"{sql}'{run_id}'\""  # reads better than what shlex makes of quotes within quotes
    literal = "'" + run_id.replace("'", "''") + "'"
    return shlex.join(["prosparse", "query", sql + literal])


def standalone(svg: str) -> str:
    """A figure of the report as a file of its own: paper under it, fonts named, colours written out, a margin."""
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert box is not None, "a figure of the report has a viewBox"
    width, height = (float(v) + 2 * _PADDING for v in box.groups())
    place = f'viewBox="{-_PADDING} {-_PADDING} {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = head.replace(box[0], f'{place} font-family="{_FONTS}"')
    paper = f'<rect x="{-_PADDING}" y="{-_PADDING}" width="{width:g}" height="{height:g}" fill="{PAPER}"/>'
    return re.sub(r"var\(--\w+, (#[0-9a-f]{6})\)", r"\1", f"{head}>\n{paper}\n{body}") + "\n"


def _if_any(grid: Grid) -> Grid | None:
    return grid if grid.rows else None


def _table(grid: Grid) -> str:
    """A table without the heading: the page has its own."""
    return grid.markdown().partition("\n")[2].strip()


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _replace(folder: Path, page_name: str, text: str, figures: dict[str, str]) -> list[Path]:
    """Everything under a hidden folder beside its place first, then moved over, the page last."""
    staging = folder / f".results-{os.getpid()}-{secrets.token_hex(4)}"
    target = folder / FIGURES
    try:
        try:
            staging.mkdir(parents=True)
            for name, content in {**figures, page_name: text}.items():
                with open(staging / name, "w", encoding="utf-8", errors="replace") as handle:
                    handle.write(content)
                    handle.flush()
                    os.fsync(handle.fileno())
            if figures:
                target.mkdir(exist_ok=True)
            for name in sorted(figures):
                os.replace(staging / name, target / name)
            os.replace(staging / page_name, folder / page_name)
            for stale in target.glob("*.svg") if page_name == PAGE else ():
                if stale.name not in figures and _OWN.fullmatch(stale.name):
                    stale.unlink()
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"the page {page_name} cannot be written to {folder}: {error.strerror}",
            hint="give another folder with --markdown, or free some space",
        ) from error
    return [folder / page_name, *(target / name for name in sorted(figures))]
