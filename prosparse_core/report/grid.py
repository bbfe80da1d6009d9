"""A table of the report: cells with a value and small print, and numbered notes for what is n/a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prosparse_core.report.format import NA

NOT_APPLICABLE = "\u2013"


@dataclass(frozen=True)
class Column:
    title: str
    small: str = ""
    is_number: bool = True
    group: str = ""
    """Neighbours of one group stand under one heading."""


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""
    note: int | None = None
    """Number of the note that says why the value is missing."""
    is_code: bool = False
    tone: str = ""
    """``good``, ``bad`` or ``quiet``."""


@dataclass
class Grid:
    """Rows of cells under columns; ``notes`` are numbered from 1."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def missing(self, reason: str) -> Cell:
        """A cell that reads n/a and points to its reason."""
        if reason not in self.notes:
            self.notes.append(reason)
        return Cell(NA, note=1 + self.notes.index(reason), tone="quiet")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(heading, number of columns), left to right; empty when no column has a group."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(name for name, _ in spans) else []

    def records(self) -> list[dict[str, str]]:
        """One plain row per line, for machines and table artifacts."""
        names = [": ".join(p for p in (c.group, c.title) if p) or f"column {i}" for i, c in enumerate(self.columns)]
        return [dict(zip(names, (_joined(cell) for cell in row), strict=True)) for row in self.rows]

    def markdown(self) -> str:
        """A Markdown table with its notes below."""
        names = [": ".join(p for p in (c.group, c.title) if p) for c in self.columns]
        names = [f"{n} ({c.small})" if c.small else n for n, c in zip(names, self.columns, strict=True)]
        lines = [_line(names), _line(["---:" if c.is_number else ":---" for c in self.columns])]
        lines += [_line([_marked(cell) for cell in row]) for row in self.rows]
        notes = [f"{i}. {escaped(note)}" for i, note in enumerate(self.notes, start=1)]
        return "\n".join([f"### {escaped(self.title)}", "", *lines, "", *notes]).rstrip() + "\n"


def _joined(cell: Cell) -> str:
    return " ".join(f"{cell.text} {cell.small}".split())


def _marked(cell: Cell) -> str:
    """On one line: the spread directly after the value, everything else after a comma."""
    text = cell.text
    for small in cell.small.splitlines():
        text += f" {small}" if small.startswith("±") else f", {small}"
    return text + (f" [{cell.note}]" if cell.note else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c if set(c) <= set(":-") and len(c) > 3 else escaped(c) for c in cells) + " |"


def escaped(text: str) -> str:
    """Text that stays text in Markdown: no markup, no HTML, no second cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + c if c in "\\`*_[]|#~" else c for c in text)
