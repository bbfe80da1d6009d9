"""How a recipe would be spread over processes: devices, kind of parallelism, sequences a rank takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prosparse_core.errors import BadInput
from prosparse_core.hardware import Device, find_device
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_machine import Hardware

Parallel = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Asked:
    """What the command line says instead of the recipe's ``hardware``; None is the recipe's."""

    gpu: str | None = None
    gpus: int | None = None
    """Of one node."""
    nodes: int | None = None
    parallel: Literal["ddp", "fsdp"] | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None


@dataclass(frozen=True)
class Layout:
    """Where training runs. A rank is one process; on GPUs it has one of them, on CPUs all cores."""

    device: Device
    count: int
    """Devices in all."""
    nodes: int
    parallel: Parallel
    sequences: int
    """A forward pass of a rank takes this many."""
    passes: int
    """Forward and backward passes of a rank before a step of the optimizer."""
    gradient_checkpointing: bool

    @property
    def world(self) -> int:
        return self.count if self.device.is_gpu else 1

    @property
    def text(self) -> str:
        nodes = f"{self.nodes} nodes of {self.count // self.nodes}" if self.nodes > 1 else f"{self.count}"
        parallel = "" if self.world == 1 else f", {self.parallel}"
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        passes = f"{self.passes} passes of " if self.passes > 1 else ""
        batch = f"{passes}{self.sequences} sequence{'s' if self.sequences > 1 else ''} a rank and step"
        return f"{nodes} x {self.device.name}{parallel}{checkpointing}, {batch}"


def lay_out(recipe: Recipe, asked: Asked = Asked()) -> tuple[Layout, bool]:
    """(the layout, whether its kind of parallelism was chosen by somebody; if not it is ddp, and may become fsdp).

    Raises:
        BadInput: an unknown device, or a number of ranks that does not divide the sequences of a step.
    """
    base = recipe.hardware or Hardware(device="cpu-core", count=2)
    device = find_device(asked.gpu or base.device)
    wants_gpus = (asked.gpus or asked.nodes) and not device.is_gpu
    if wants_gpus:
        raise BadInput("--gpus and --nodes are about GPUs", hint="name one, for example --gpu a100-80g")
    nodes = asked.nodes or (1 if asked.gpus else base.nodes)
    per_node = asked.gpus or (base.count // base.nodes if device.is_gpu == find_device(base.device).is_gpu else 1)
    count = nodes * per_node
    world = count if device.is_gpu else 1
    step = recipe.train.tokens_per_step // recipe.data.seq_len
    if step % world:
        fitting = [w for w in range(1, step + 1) if step % w == 0]
        near = sorted(sorted(fitting, key=lambda w: abs(w - world))[:3])
        raise BadInput(
            f"{world} ranks do not divide the {step:,} sequences of a step (train.tokens_per_step / data.seq_len)",
            hint=f"{', '.join(map(str, near))} ranks would, or change train.tokens_per_step",
        )
    share = step // world
    sequences = min(asked.micro_batch or recipe.train.micro_batch or share, share)
    if share % sequences:
        near = [m for m in range(1, share + 1) if share % m == 0]
        raise BadInput(
            f"a micro batch of {sequences} does not divide the {share:,} sequences of a rank's share of a step",
            hint=f"use one of {', '.join(map(str, sorted(near, key=lambda m: abs(m - sequences))[:4]))}",
        )
    checkpointing = asked.gradient_checkpointing
    layout = Layout(
        device=device,
        count=count,
        nodes=nodes,
        parallel="single" if world == 1 else asked.parallel or base.parallel or "ddp",
        sequences=sequences,
        passes=share // sequences,
        gradient_checkpointing=base.gradient_checkpointing if checkpointing is None else checkpointing,
    )
    return layout, bool(world == 1 or asked.parallel or base.parallel)
