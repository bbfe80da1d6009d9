"""What the checkpoints of a run cost, and how often they come: by assumed rates, until a run has measured its own."""

from __future__ import annotations

from dataclasses import dataclass

from prosparse_core.checkpoint_pace import COPY_BYTES_PER_S, WRITE_BYTES_PER_S, Pace, expected
from prosparse_core.planning.layout import Layout
from prosparse_core.planning.shapes import Weights
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_machine import Shape


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a run."""

    bytes: int
    """Of one: fp32 weights, and two moments of those that are trained."""
    blocking_s: float
    """Training waits this long for each."""
    write_s: float
    interval_s: float
    number: int
    share: float
    """Of the time of the run."""
    assumption: str


def checkpoint_bytes(recipe: Recipe, shape: Shape) -> int:
    weights = Weights.of(shape)
    return 4 * weights.all + 8 * weights.trained("embeddings" in recipe.train.freeze)


def saving(recipe: Recipe, shape: Shape, layout: Layout, hours: float) -> Saving:
    """For a run of so many hours."""
    size, runtime = checkpoint_bytes(recipe, shape), recipe.runtime
    on_cpu = not layout.device.is_gpu
    pace: Pace = expected(size, processes=layout.world, nodes=layout.nodes, on_cpu=on_cpu)
    minutes = runtime.checkpoint_every_minutes
    interval = pace.interval_s(runtime.checkpoint_overhead) if minutes is None else 60 * minutes
    assumption = (
        f"copied at {COPY_BYTES_PER_S / 1e9:g} GB/s a process, written at {WRITE_BYTES_PER_S / 1e6:g} MB/s a node"
    )
    return Saving(
        bytes=size,
        blocking_s=pace.blocking_s,
        write_s=pace.write_s,
        interval_s=interval,
        number=int(hours * 3600 / interval),
        share=pace.cost_s / interval,
        assumption=assumption + (", which takes the cores that train" if on_cpu else ""),
    )
