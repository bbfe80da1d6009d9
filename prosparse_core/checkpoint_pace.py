"""How often a stage is saved: so that checkpoints take no more than a share of the time (``checkpoint_overhead``)."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prosparse_core.recipe_runtime import Runtime

COPY_BYTES_PER_S = 2e9
WRITE_BYTES_PER_S = 250e6
"""Until a checkpoint was measured, and in plans: assumptions. A process copies its share into its host's memory; a node
writes what its processes copied, and hashes it."""
SHORTEST_S = 60.0
"""More often than this, less than a minute of work would be saved."""


@dataclass(frozen=True)
class Pace:
    """What a checkpoint costs, and so how long it is from one to the next."""

    blocking_s: float
    """The training loop waits this long."""
    write_s: float
    """The writing in the background. The next checkpoint waits for it."""
    on_cpu: bool
    """Training needs the cores that the writing takes: all of that counts as cost."""

    @property
    def cost_s(self) -> float:
        return self.blocking_s + (self.write_s if self.on_cpu else 0.0)

    def interval_s(self, overhead: float) -> float:
        """Seconds from one checkpoint to the next, so that they cost at most ``overhead`` of the time."""
        return max(self.cost_s / overhead, self.blocking_s + self.write_s, SHORTEST_S)


def expected(num_bytes: float, *, processes: int, nodes: int, on_cpu: bool) -> Pace:
    """Of a checkpoint of ``num_bytes``, of which every process copies, and every node writes, an equal share."""
    return Pace(num_bytes / processes / COPY_BYTES_PER_S, num_bytes / nodes / WRITE_BYTES_PER_S, on_cpu)


class Clock:
    """Tells when the next checkpoint is due, by time; asked in one process, which then tells the others."""

    def __init__(self, runtime: Runtime, num_bytes: float, *, on_cpu: bool) -> None:
        self._fixed_s = None if runtime.checkpoint_every_minutes is None else 60 * runtime.checkpoint_every_minutes
        self._overhead = runtime.checkpoint_overhead
        self.pace = expected(num_bytes, processes=runtime.world_size, nodes=runtime.nodes, on_cpu=on_cpu)
        self._since = time.monotonic()

    @property
    def interval_s(self) -> float:
        return self._fixed_s or self.pace.interval_s(self._overhead)

    def is_due(self) -> bool:
        return time.monotonic() - self._since >= self.interval_s

    def saved(self) -> None:
        """A checkpoint was begun."""
        self._since = time.monotonic()

    def measured(self, blocking_s: float, write_s: float) -> None:
        """What the last checkpoint cost."""
        self.pace = Pace(blocking_s, write_s, self.pace.on_cpu)
