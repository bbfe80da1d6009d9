"""What a query returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns and rows of a query; values are what duckdb gives (MAP is a dict, JSON is text, times are UTC)."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    types: list[str] = field(default_factory=list)
    """SQL type of each column."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def records(self) -> list[dict[str, Any]]:
        """One dict per row, JSON columns decoded."""
        decode = [kind == "JSON" for kind in self.types] or [False] * len(self.columns)
        return [
            {
                name: json.loads(value) if is_json and isinstance(value, str) else value
                for name, value, is_json in zip(self.columns, row, decode, strict=True)
            }
            for row in self.rows
        ]
