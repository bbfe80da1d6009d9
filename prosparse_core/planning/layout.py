"""How a recipe would be spread over processes: devices, kind of parallelism, sequences a rank takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prosparse_core.errors import BadInput
from prosparse_core.planning.hardware import Device, find_device
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_machine import Hardware

Parallel = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Asked:
    """What the command line says instead of the recipe's ``hardware`` and ``runtime``; None is the recipe's."""

    gpu: str | None = None
    gpus: int | None = None
    """Of one node."""
    nodes: int | None = None
    parallel: Literal["ddp", "fsdp"] | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None


@dataclass(frozen=True)
class Layout:
    """Where training runs."""

    device: Device
    count: int
    """Devices in all: GPUs, or cores."""
    world: int
    """Ranks: processes that train. A GPU has one; cores are shared among all."""
    nodes: int
    parallel: Parallel
    sequences: int
    """A forward pass of a rank takes this many."""
    passes: int
    """Forward and backward passes of a rank before a step of the optimizer."""
    gradient_checkpointing: bool

    @property
    def text(self) -> str:
        nodes = f"{self.nodes} nodes of {self.count // self.nodes}" if self.nodes > 1 else f"{self.count}"
        processes = f", {self.world} processes" if self.world > 1 and not self.device.is_gpu else ""
        parallel = "" if self.world == 1 else f", {self.parallel}"
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        passes = f"{self.passes} passes of " if self.passes > 1 else ""
        batch = f"{passes}{self.sequences} sequence{'s' if self.sequences > 1 else ''} a rank and step"
        return f"{nodes} x {self.device.name}{processes}{parallel}{checkpointing}, {batch}"


def lay_out(recipe: Recipe, asked: Asked = Asked()) -> tuple[Layout, bool]:
    """(the layout, whether its kind of parallelism was chosen by somebody; if not it is ddp, and may become fsdp).

    Raises:
        BadInput: an unknown device, or a number of ranks that does not divide the sequences of a step.
    """
    hardware, runtime = recipe.hardware or Hardware(device="cpu-core", count=2), recipe.runtime
    device = find_device(asked.gpu or hardware.device)
    nodes = asked.nodes or (1 if asked.gpus else runtime.nodes)
    if not device.is_gpu:
        if asked.gpus or asked.nodes:
            raise BadInput("--gpus and --nodes are about GPUs", hint="name one, for example --gpu a100-80g")
        count, world = hardware.count, runtime.world_size
    else:
        of_recipe = runtime.world_size if runtime.is_launched else hardware.count
        known = find_device(hardware.device).is_gpu or runtime.is_launched
        per_node = asked.gpus or (max(1, of_recipe // runtime.nodes) if known else 1)
        count = world = nodes * per_node
    sequences, passes = _share(recipe, world, asked.micro_batch or recipe.train.micro_batch)
    chosen = asked.parallel or (runtime.parallel if "parallel" in runtime.model_fields_set else None)
    checkpointing = asked.gradient_checkpointing
    layout = Layout(
        device=device,
        count=count,
        world=world,
        nodes=nodes,
        parallel="single" if world == 1 else chosen or "ddp",
        sequences=sequences,
        passes=passes,
        gradient_checkpointing=runtime.gradient_checkpointing if checkpointing is None else checkpointing,
    )
    return layout, bool(world == 1 or chosen)


def _share(recipe: Recipe, world: int, micro_batch: int | None) -> tuple[int, int]:
    """(sequences of a forward pass, passes of a step) of one of ``world`` ranks."""
    step = recipe.train.tokens_per_step // recipe.data.seq_len
    if step % world:
        fitting = [w for w in range(1, step + 1) if step % w == 0]
        near = sorted(sorted(fitting, key=lambda w: abs(w - world))[:3])
        raise BadInput(
            f"{world} ranks do not divide the {step:,} sequences of a step (train.tokens_per_step / data.seq_len)",
            hint=f"{', '.join(map(str, near))} ranks would, or change train.tokens_per_step",
        )
    share = step // world
    sequences = min(micro_batch or share, share)
    if share % sequences:
        fitting = [m for m in range(1, share + 1) if share % m == 0]
        near = sorted(sorted(fitting, key=lambda m: abs(m - sequences))[:3])
        raise BadInput(
            f"a micro batch of {sequences} does not divide the {share:,} sequences of a rank's share of a step",
            hint=f"{', '.join(map(str, near))} would",
        )
    return sequences, share // sequences
