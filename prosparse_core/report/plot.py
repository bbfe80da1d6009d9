"""What a plot of the report is: drawn twice, for a desk and for a phone, from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field

from prosparse_core.report.data import Record
from prosparse_core.report.sheet import NARROW, WIDE, Sheet, draw


@dataclass(frozen=True)
class Plot:
    """A figure, the rows behind it, and how to read it."""

    name: str
    title: str
    aid: str
    """One sentence that tells how to read it, true whatever the data say."""
    alt: str
    """What it shows, for people who do not see it."""
    sql: str
    rows: list[Record]
    paint: Callable[[int], Sheet] | None = None
    missing: str = ""
    """Why there is nothing to paint."""
    remarks: list[str] = field(default_factory=list)

    @property
    def wide(self) -> str:
        return draw(self.paint, WIDE, f"{self.name}-wide", self.alt) if self.paint else ""

    @property
    def narrow(self) -> str:
        return draw(self.paint, NARROW, f"{self.name}-narrow", self.alt) if self.paint else ""

    def csv(self) -> str:
        """The data behind the figure."""
        out = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return out.getvalue()
