"""The report of a run: one self-contained HTML file with its tables and plots, all of it read from the ledger."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from prosparse_core.errors import EnvironmentProblem
from prosparse_core.ledger import Ledger
from prosparse_core.report.data import ReportData, collect
from prosparse_core.report.markdown import write_results
from prosparse_core.report.page import plots, render, summary

__all__ = ["ReportData", "closing_tables", "collect", "write_data", "write_page", "write_report", "write_results"]


def write_report(ledger: Ledger, run_id: str, target: Path) -> Path:
    """Write the report of a run to ``target``, which is replaced at once or not at all; returns ``target``.

    The page needs no network and nothing beside it. A run that failed, stopped early or is still running gets a report
    too: what is missing reads n/a, with the reason.

    Raises:
        BadInput: the ledger knows no such run.
        EnvironmentProblem: ``target`` cannot be written.
    """
    return write_page(collect(ledger, run_id), target)


def write_page(data: ReportData, target: Path) -> Path:
    """:func:`write_report` for data already collected."""
    return _write(Path(target), render(data))


def write_data(data: ReportData, folder: Path) -> list[Path]:
    """One CSV per plot, with the rows behind it, named after the plot; a plot without rows has none."""
    return [_write(folder / f"{plot.name}.csv", plot.csv()) for plot in plots(data) if plot.rows]


def closing_tables(data: ReportData) -> list[tuple[str, str, list[dict[str, str]]]]:
    """(key, Markdown, rows) of the tables a run closes with: results, predictors, speed; those it has."""
    return [(key, grid.markdown(), grid.records()) for key, grid in summary(data)]


def _write(target: Path, text: str) -> Path:
    # Not named after the target alone: two runs may write to one place, and a name can be as long as the system allows.
    temporary = target.with_name(f".report-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8", errors="replace") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"the report {target} cannot be written: {error.strerror}",
            hint="give another place with --out, or free some space",
        ) from error
    return target
