"""What ``prosparse plan`` says a recipe costs, as the rows of its tables."""

from __future__ import annotations

from typing import Any, Literal

from prosparse_core.planning.cost import Cost
from prosparse_core.planning.hardware import GIB
from prosparse_core.planning.preparation import Preparation
from prosparse_core.planning.saving import Saving

Rows = list[list[str]]


def cost_rows(cost: Cost) -> Rows:
    """Sizes, compute and disk."""
    disk, keep = cost.disk, cost.keep
    measuring = f"{cost.measuring_hours:,.1f} (thresholds and held-out text; benchmarks on top)"
    other: Literal["last", "all"] = "last" if keep == "all" else "all"
    return [
        ["parameters", f"{cost.parameters / 1e6:,.1f} M"],
        ["training tokens", tokens(cost.tokens)],
        ["of each corpus", ", ".join(f"{name} {tokens(taken)}" for name, taken in cost.corpora.items())],
        ["training FLOPs", f"{cost.flops:.3g}"],
        ["hardware", cost.hardware],
        *([["", cost.remark]] if cost.remark else []),
        ["training hours", f"{cost.hours:,.1f} ({cost.assumption})"],
        *preparation_rows(cost.preparation),
        ["checkpoints", saving_text(cost.saving)],
        *([["measuring hours", measuring]] if cost.measuring_hours else []),
        ["disk, at most", f"{size(disk.most[keep])} (runtime.keep={keep}; with {other} {size(disk.most[other])})"],
        ["disk, stages", f"{size(disk.stages[keep])} (with {other} {size(disk.stages[other])})"],
        ["disk, a stage", f"{size(disk.stage)}, of which the optimizer's state {size(disk.stage - disk.base_model)}"],
        ["disk, a checkpoint", f"{size(disk.checkpoint)}, {disk.num_checkpoints} of them while one is written"],
        ["disk, base model", size(disk.base_model)],
        ["disk, corpora", size(disk.corpora)],
        ["disk, export", f"{size(disk.export)}, predictor {size(disk.predictor)}"],
    ]  # fmt: skip


def preparation_rows(data: Preparation) -> Rows:
    """The mixture: before training, and beside it where it is streamed."""
    rows: Rows = []
    if data.tokens:
        what = f"{tokens(data.tokens)} tokens at most, {_processes(data.processes)}, {data.assumption}"
        rows.append(["mixture hours, before training", f"{_hours(data.hours)} ({what})"])
    if data.streamed_tokens:
        rate = f"{_processes(data.stream_processes)} make {tokens(round(data.stream_rate))} tokens/s of the "
        rate += f"{tokens(round(data.streamed_tokens_per_s))} that training takes ({data.assumption})"
        behind = "" if data.keeps_up else f": training waits, {_hours(data.stream_hours)} hours for the streams alone"
        rows.append(["mixture, beside training", f"{tokens(data.streamed_tokens)} tokens streamed, {rate}{behind}"])
    return rows


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else "under 0.1"


def stage_rows(cost: Cost) -> list[list[Any]]:
    """Steps, lambda, learning rate (at the first step and at the last) and corpora; these only where they change."""
    rows: list[list[Any]] = []
    before: dict[str, float] | None = None
    for stage in cost.stages:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in stage.mixture.items())
        rate = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in stage.lr))
        rows.append(
            [
                f"{stage.index}" + ("" if stage.phase == "prosparse" else f" · {stage.phase}"),
                f"{stage.first_step:,}-{stage.until_step:,}",
                stage.ramp,
                stage.l1,
                rate,
                "as before" if stage.mixture == before else shares,
                tokens(stage.tokens),
            ]
        )
        before = stage.mixture
    return rows


def saving_text(saving: Saving) -> str:
    """How often a checkpoint comes, and what it costs."""
    every = f"{saving.interval_s / 60:,.1f} min" if saving.interval_s < 5400 else f"{saving.interval_s / 3600:,.1f} h"
    each = f"{size(saving.bytes)} each, {saving.blocking_s:,.1f} s waiting and {saving.write_s:,.1f} s behind it"
    return f"{saving.number:,}, one every {every}: {saving.share:.1%} of the time; {each} ({saving.assumption})"


def memory_rows(cost: Cost) -> Rows:
    """What a rank holds at its fullest, largest term first; then the sum and what there is."""
    memory, ranks = cost.memory, cost.layout.world
    rows = [[term, size(held)] for term, held in sorted(memory.terms.items(), key=lambda item: -item[1])]
    rows.append(["in all", size(memory.total) + (f", {size(cost.memory_bytes)} on {ranks} ranks" if ranks > 1 else "")])
    if memory.host_bytes:
        rows.append(["host of the first rank", f"{size(memory.host_bytes)}, while a checkpoint or a stage is written"])
    return rows


def verdict(cost: Cost) -> str:
    """One line: whether a rank has the memory, and what would fit if not."""
    if cost.fit.limit_bytes >= 1 << 62:
        return f"needs {size(cost.memory.total)} of memory"
    there = f"{size(cost.memory.total)} of {size(cost.fit.limit_bytes)} that a rank may use"
    if cost.fit.fits:
        return f"fits: {there}"
    ways = (
        "; or ".join(cost.fit.ways_out) or "no layout of up to 4,096 devices does: a smaller model, or larger devices"
    )
    return f"DOES NOT FIT: {there}. What fits: {ways}"


def size(held: int) -> str:
    """12.3 GiB, 45 MiB."""
    return f"{held / GIB:,.1f} GiB" if held >= 0.1 * GIB else f"{held / 2**20:,.0f} MiB"


def tokens(count: int) -> str:
    """34.60 B, 174.1 K: as the paper's tables print tokens."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)
