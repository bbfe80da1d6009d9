"""How long work tells what it does; the console, or nothing at all, stands behind it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a step reports while it runs."""

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        """``done`` of ``total`` units are finished; ``fields`` are shown beside, by name."""

    def note(self, text: str) -> None:
        """One line worth reading later."""


class Silent:
    """Progress that nobody watches."""

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
