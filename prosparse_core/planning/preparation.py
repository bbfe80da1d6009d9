"""What preparing a mixture takes: before training, or beside it where corpora are streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prosparse_core.data.processes import MOST_PROCESSES, TOKENS_PER_CPU_S, num_processes
from prosparse_core.planning.layout import Layout
from prosparse_core.recipe import Recipe


@dataclass(frozen=True)
class Preparation:
    """An estimate, from a rate per process that is an assumption."""

    tokens: int
    """At most, of the corpora that lie on disk before training begins."""
    processes: int
    hours: float
    streamed_tokens: int
    """What training takes of the others."""
    streamed_tokens_per_s: float
    """As fast as training takes them."""
    stream_processes: int
    stream_rate: float
    """Tokens a second that these prepare."""
    stream_hours: float
    """If training took no time."""
    assumption: str

    @property
    def keeps_up(self) -> bool:
        """Whether training need not wait for its streams."""
        return self.stream_rate >= self.streamed_tokens_per_s


def preparation(recipe: Recipe, layout: Layout, taken: Mapping[str, float], train_hours: float) -> Preparation:
    """For a training of ``train_hours``, all settings of a comparison together; ``taken``: its tokens by corpus."""
    trained = [source for source in recipe.data.sources if taken[source.name]]
    tokens = sum(source.max_tokens for source in trained if not source.stream)
    streamed = round(sum(taken[source.name] for source in trained if source.stream))
    shards = [source.max_tokens // recipe.data.stream_shards for source in trained if source.stream]
    # A node with GPUs has more cores than are used by default; this machine need not be one.
    asked, cores = recipe.runtime.data_processes, MOST_PROCESSES if layout.device.is_gpu else None
    before, beside = num_processes(asked, tokens, cores), num_processes(asked, max(shards, default=0), cores)
    return Preparation(
        tokens=tokens,
        processes=before,
        hours=tokens / (before * TOKENS_PER_CPU_S) / 3600,
        streamed_tokens=streamed,
        streamed_tokens_per_s=streamed / (3600 * train_hours) if train_hours else 0.0,
        stream_processes=beside,
        stream_rate=float(beside * TOKENS_PER_CPU_S),
        stream_hours=streamed / (beside * TOKENS_PER_CPU_S) / 3600,
        assumption=f"{TOKENS_PER_CPU_S / 1e3:g} K tokens a second and process",
    )
