"""Steps that would do harm: their loss or gradient is no number, or far above those before.

Judged before the weights move, by numbers that every process has alike; what happened is recorded beside the log.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prosparse_core.distributed.ranks import Ranks
from prosparse_core.recipe_train import Train

EVENTS = "events.jsonl"
BROKEN = 3
"""Bad steps in a row that end a stage: leaving out data mends no weights."""
Action = Literal["skip", "rollback", "fail", "ignore"]


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step, and what the recipe says to do."""

    action: Action
    reason: str

    @property
    def takes_step(self) -> bool:
        return self.action == "ignore"


class Guard:
    """Judges the steps of one stage by those that were taken before; ``state`` and back, to the bit."""

    def __init__(self, train: Train, state: Mapping[str, Any] | None = None) -> None:
        self._train = train
        length = train.spike.window if train.spike else 1
        state = state or {"loss": [], "gradient norm": []}
        self._latest = {name: deque[float](state[name], maxlen=length) for name in ("loss", "gradient norm")}

    def judge(self, loss: float, norm: float) -> Verdict | None:
        """Whether a step with this next-token loss and unclipped gradient norm is bad; a good one is remembered."""
        found = {"loss": loss, "gradient norm": norm}
        if not all(map(math.isfinite, found.values())):
            return Verdict(self._train.on_non_finite, f"not finite: loss {loss:g}, gradient norm {norm:g}")
        spike = self._train.spike
        if spike is None:
            return None
        for name, value in found.items():
            before = self._latest[name]
            if len(before) < spike.window // 2:
                continue
            mean, deviation = mean_and_deviation(before)
            if value > mean + spike.sigma * deviation:
                return Verdict(spike.action, f"spike: {name} {value:g}, {mean:g} +- {deviation:g} before")
        for name, value in found.items():
            self._latest[name].append(value)
        return None

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._latest.items()}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, the same to the bit whatever the order of the sums."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class Event:
    """A bad step. ``first_step``: of a rollback, the first step that was taken back."""

    stage: int
    step: int
    action: Action
    reason: str
    lm_loss: float
    grad_norm: float
    first_step: int | None = None


class Events:
    """The bad steps of a stage, kept in ``events.jsonl``: what a rollback passes over must outlive the process."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._path, self._ranks = folder / EVENTS, ranks
        self._events: list[Event] = ranks.from_first(_read(self._path) if ranks.is_first else [])

    def passed(self, step: int) -> bool:
        """Whether a rollback takes the step out of training."""
        return any(e.first_step is not None and e.first_step <= step <= e.step for e in self._events)

    def forget_from(self, step: int) -> None:
        """Steps from here on are run again, and judged again; but what was rolled back stays so."""
        self._events = [e for e in self._events if e.step < step or e.action == "rollback"]
        self._write()

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._write()

    @property
    def num_bad(self) -> int:
        """Steps that were not taken, but for those before one that was rolled back."""
        return sum(e.action != "ignore" for e in self._events)

    def in_a_row(self, step: int) -> int:
        """Bad steps one after the other, of which ``step`` is the last."""
        bad = {e.step for e in self._events if e.action != "ignore"}
        return next(n for n in range(len(bad) + 1) if step - n not in bad)

    def _write(self) -> None:
        if not self._ranks.is_first or not (self._events or self._path.exists()):
            return
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(asdict(e)) + "\n" for e in self._events), encoding="utf-8")
        temporary.replace(self._path)


def _read(path: Path) -> list[Event]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Event(**json.loads(line)) for line in lines]
