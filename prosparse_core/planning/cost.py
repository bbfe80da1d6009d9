"""What a recipe costs: parameters, tokens, FLOPs, memory, disk, hours. Estimates, with their assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from prosparse_core import settings
from prosparse_core.planning.disk import Disk, disk
from prosparse_core.planning.hardware import GIB, Device
from prosparse_core.planning.layout import Asked, Layout, lay_out
from prosparse_core.planning.memory import USABLE, Memory, Training, memory
from prosparse_core.planning.preparation import Preparation, preparation
from prosparse_core.planning.saving import Saving, saving
from prosparse_core.planning.shapes import Weights
from prosparse_core.planning.shapes import shape_of as shape_of
from prosparse_core.precision import resolve
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_machine import Shape
from prosparse_core.schedule import first_step, learning_rate
from prosparse_core.shares import SampleOrder, segments_of

FORWARD_SHARE = 1 / 3
"""Of the work of a training step: 2 FLOPs a weight and token, where forward and backward need 6."""
MOST_GPUS = 4096
"""As far as a way out is looked for."""


@dataclass(frozen=True)
class StageCost:
    """One stage of the plan."""

    index: int
    first_step: int
    until_step: int
    l1: float
    ramp: str
    phase: str
    lr: tuple[float, float]
    """The learning rate at its first step and at its last."""
    mixture: dict[str, float]
    """Its share of each corpus it trains on."""
    tokens: int
    """Accumulated tokens at the end of the stage, as the paper's tables print them."""


@dataclass(frozen=True)
class Fit:
    """Whether a rank's memory is enough."""

    fits: bool
    limit_bytes: int
    ways_out: list[str]
    """What would fit instead; empty when it fits, or nothing does."""


@dataclass(frozen=True)
class Cost:
    """A whole run, estimated."""

    parameters: int
    tokens: int
    flops: float
    """Of the model, 6 a parameter and token; what gradient checkpointing computes again is not in it."""
    hours: float
    assumption: str
    hardware: str
    layout: Layout
    remark: str | None
    """Why the layout is another than the recipe's words would be read as."""
    memory: Memory
    memory_bytes: int
    """Of all ranks together."""
    fit: Fit
    preparation: Preparation
    disk: Disk
    saving: Saving
    keep: Literal["last", "all"]
    stages: list[StageCost]
    corpora: dict[str, int]
    """Tokens that the stages together take of each corpus."""
    measuring_hours: float = 0.0
    """Of a comparison: calibrating thresholds and reading held-out text; benchmarks come on top."""


def training_flops(recipe: Recipe, s: Shape) -> float:
    """6 FLOPs per weight that is multiplied and token, and attention's own 12 L q T, of which causality needs half."""
    multiplied = Weights.of(s).matrices(s)
    return recipe.train.total_tokens * (6.0 * multiplied + 6 * s.num_layers * s.q_dim * recipe.data.seq_len)


def cost(
    recipe: Recipe,
    shape: Shape,
    tokens_per_s: float | None = None,
    asked: Asked = Asked(),  # noqa: B008 (immutable)
    machine_bytes: int | None = None,
) -> Cost:
    """The estimate for a recipe.

    Args:
        tokens_per_s: measured training speed of an earlier run of this model on this machine, when there is one.
        asked: devices and ways to use them, instead of the recipe's.
        machine_bytes: this machine's memory, for a plan on its CPU; None when unknown.

    Raises:
        BadInput: see :func:`prosparse_core.planning.layout.lay_out`.
    """
    layout, chosen = lay_out(recipe, asked)
    training = training_of(recipe, shape, layout.device)
    remark = None
    found, limit = memory(training, layout), _limit(layout, machine_bytes)
    if not chosen and found.total > limit:
        sharded = replace(layout, parallel="fsdp")
        remark = f"fsdp, because under ddp a rank would need {found.total / GIB:,.1f} GiB"
        layout, found = sharded, memory(training, sharded)
    fits = found.total <= limit
    ways = [] if fits else list(_ways_out(training, layout, limit))
    flops = training_flops(recipe, shape)
    hours, assumption = _hours(recipe, shape, layout, flops, tokens_per_s if layout.world == 1 else None)
    return Cost(
        parameters=Weights.of(shape).all,
        tokens=recipe.train.total_tokens,
        flops=flops,
        hours=hours,
        assumption=assumption,
        hardware=layout.text,
        layout=layout,
        remark=remark,
        memory=found,
        memory_bytes=found.total * layout.world,
        fit=Fit(fits, limit, ways),
        preparation=preparation(recipe, layout, _taken(recipe), hours),
        disk=disk(recipe, shape),
        saving=saving(recipe, shape, layout, hours),
        keep=recipe.runtime.keep,
        stages=_stages(recipe),
        corpora=_taken(recipe),
    )


def comparison_cost(
    recipe: Recipe,
    shape: Shape,
    tokens_per_s: float | None = None,
    asked: Asked = Asked(),  # noqa: B008 (immutable)
    machine_bytes: int | None = None,
) -> Cost:
    """The estimate for every setting of ``recipe.compare``; see :func:`cost`."""
    one = cost(recipe, shape, tokens_per_s, asked, machine_bytes)
    rows = settings.rows(recipe)
    trained = settings.training_of(rows, recipe.seed)
    more = trained.tokens / one.tokens
    hours = one.hours * more
    return replace(
        one,
        tokens=trained.tokens,
        flops=one.flops * more,
        hours=hours,
        preparation=preparation(recipe, one.layout, {name: count * more for name, count in one.corpora.items()}, hours),
        measuring_hours=one.hours * FORWARD_SHARE * measured_tokens(recipe, rows) / one.tokens,
        saving=saving(recipe, shape, one.layout, hours),
        disk=disk(recipe, shape, trained.num_stages, trained.num_last),
    )


def measured_tokens(recipe: Recipe, rows: list[settings.Row]) -> int:
    """Held-out tokens that go forward to calibrate and evaluate these rows."""
    from prosparse_core.calibration import CETTS

    section, data = recipe.calibrate, recipe.data
    trials = len(section.thresholds) + section.refine
    trials += 0 if section.rule == "grid" else len(CETTS) + section.refine
    calibrated = sum(row.thresholds_of is not None for row in rows)
    return len(data.sources) * (len(rows) * data.evaluation_tokens + calibrated * trials * data.calibration_tokens)


def training_of(recipe: Recipe, shape: Shape, device: Device) -> Training:
    """What of a recipe decides memory; ``auto`` precision is bf16 on GPUs, and on CPUs what this one multiplies."""
    precision = recipe.model.precision
    if precision == "auto":
        precision = "bf16" if device.is_gpu else resolve("auto")
    return Training(
        shape=shape,
        seq_len=recipe.data.seq_len,
        precision=precision,
        frozen_embeddings="embeddings" in recipe.train.freeze,
        teacher=any(stage.distill for stage in recipe.train.stages),
    )


def _limit(layout: Layout, machine_bytes: int | None) -> int:
    """Bytes a rank may use. A CPU whose memory is unknown limits nothing."""
    if layout.device.memory_bytes:
        return int(USABLE * layout.device.memory_bytes)
    return int(USABLE * machine_bytes / max(1, layout.world // layout.nodes)) if machine_bytes else 2**63 - 1


def _ways_out(training: Training, layout: Layout, limit: int) -> Iterator[str]:
    """The smallest changes that fit: each alone, else all of them, else more devices."""
    changes: dict[str, dict[str, Any]] = {}
    if layout.sequences > 1:
        changes["--micro-batch 1"] = {"sequences": 1, "passes": layout.sequences * layout.passes}
    if not layout.gradient_checkpointing:
        changes["--gradient-checkpointing"] = {"gradient_checkpointing": True}
    if layout.parallel == "ddp":
        changes["--parallel fsdp"] = {"parallel": "fsdp"}
    alone = [words for words, change in changes.items() if _fits(training, replace(layout, **change), limit)]
    yield from alone
    if alone:
        return
    merged: dict[str, Any] = {key: value for change in changes.values() for key, value in change.items()}
    all_ = replace(layout, **merged)
    words = " ".join(changes)
    if len(changes) > 1 and _fits(training, all_, limit):
        yield words
        return
    if not layout.device.is_gpu:
        yield "a shorter data.seq_len, a machine with more memory, or GPUs (--gpu)"
        return
    per_node = max(8, layout.count // layout.nodes)
    count = 2 * layout.count
    step = layout.sequences * layout.passes * layout.world
    while count <= MOST_GPUS and step % count == 0:
        sequences = math.gcd(all_.sequences, step // count)
        spread = replace(all_, count=count, world=count, nodes=-(-count // per_node), parallel="fsdp")
        spread = replace(spread, sequences=sequences, passes=step // count // sequences)
        if _fits(training, spread, limit):
            nodes = f"--gpus {per_node} --nodes {count // per_node}" if count > per_node else f"--gpus {count}"
            fsdp = " --parallel fsdp" if "fsdp" not in words and layout.parallel != "fsdp" else ""
            yield f"{nodes}{fsdp} {words}".strip()
            return
        count *= 2


def _fits(training: Training, layout: Layout, limit: int) -> bool:
    return memory(training, layout).total <= limit


def _hours(recipe: Recipe, shape: Shape, layout: Layout, flops: float, tokens_per_s: float | None) -> tuple[float, str]:
    """Computing, and the optimizer's traffic: 28 bytes a weight and step, of which a rank under fsdp has its share."""
    if tokens_per_s:
        seconds = recipe.train.total_tokens / tokens_per_s
        return seconds / 3600, f"{tokens_per_s:.0f} tokens/s, measured in an earlier run here"
    device = layout.device
    again = 4 / 3 if layout.gradient_checkpointing else 1.0
    seconds = again * flops / (layout.count * device.peak_flops * device.utilization)
    share = layout.world if layout.parallel == "fsdp" else 1
    seconds += recipe.train.total_steps * 28 * Weights.of(shape).all / share / device.bytes_per_s
    assumption = f"{device.peak_flops / 1e12:g} TFLOP/s a device at {device.utilization:.0%} utilization"
    return seconds / 3600, assumption + (", a third more for checkpointing" if again > 1 else "")


def _stages(recipe: Recipe) -> list[StageCost]:
    train, stages = recipe.train, []
    for index, stage in enumerate(train.stages):
        first, last = first_step(train.stages, index), stage.until_step
        weights = stage.mixture or {source.name: source.weight for source in recipe.data.sources}
        whole = sum(weights.values())
        stages.append(
            StageCost(
                index=index,
                first_step=first,
                until_step=last,
                l1=stage.l1,
                ramp=stage.ramp,
                phase=stage.phase,
                lr=(learning_rate(train, first), learning_rate(train, last)),
                mixture={name: weight / whole for name, weight in weights.items() if weight},
                tokens=last * train.tokens_per_step,
            )
        )
    return stages


def _taken(recipe: Recipe) -> dict[str, int]:
    train, seq_len = recipe.train, recipe.data.seq_len
    weights = {source.name: source.weight for source in recipe.data.sources}
    sequences = train.tokens_per_step // seq_len
    order = SampleOrder(recipe.seed, segments_of(weights, train.stages, sequences))
    taken = order.before(train.total_steps * sequences)
    return {name: samples * seq_len for name, samples in zip(weights, taken, strict=True)}
