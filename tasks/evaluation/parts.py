"""What an evaluation has measured so far, a file a task: one interrupted after hours goes on at the next task."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prosparse_core.sparsity import LayerSparsity
from prosparse_core.store import make_folder, write_json
from tasks.evaluation.held_out import Score

FOLDER = "parts"


@dataclass(frozen=True)
class Part:
    """What was measured in one task of the harness, or on one corpus."""

    scores: tuple[Score, ...]
    raw: Mapping[str, Mapping[str, Any]]
    """The harness's own results, by section and task."""
    layers: tuple[LayerSparsity, ...] = ()
    """Of the same forward passes; empty where none was metered."""
    seconds: float = 0.0


class Parts:
    """The parts of one evaluation, by name.

    Args:
        folder: where they are kept until the whole is there; it must belong to this evaluation alone, as the work
            folder of a step does. None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder / FOLDER if folder else None

    def get(self, name: str, measure: Callable[[], Part]) -> Part:
        """The part of that name: as an interrupted attempt left it, or else measured, timed and kept.

        A task may belong to two benchmarks, which ask it differently: the name has to say which.
        """
        path = self._folder / f"{quote(name, safe='')}.json" if self._folder else None
        if path and (found := _read(path)):
            return found
        began = time.monotonic()
        found = measure()
        found = replace(found, seconds=round(time.monotonic() - began, 1))
        if path:
            make_folder(path.parent)
            write_json(path, asdict(found))
        return found

    def clear(self) -> None:
        """Nothing is left of them in the folder: the whole holds all they said."""
        if self._folder and self._folder.exists():
            shutil.rmtree(self._folder)


def _read(path: Path) -> Part | None:
    """None where there is none, or none that can be read: then it is measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scores = tuple(
            Score(**{**score, "sums": tuple(score["sums"]), "counts": tuple(score["counts"])})
            for score in found["scores"]
        )
        layers = tuple(LayerSparsity(**layer) for layer in found["layers"])
        return Part(scores, found["raw"], layers, found["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
