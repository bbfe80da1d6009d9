"""What a recipe costs: parameters, tokens, FLOPs, memory, disk, hours. Estimates, with their assumptions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prosparse_core import settings
from prosparse_core.recipe import Hardware, Model, Recipe, Shape

PEAK_FLOPS = {"a100-80g": 312e12, "h100-80g": 989e12, "cpu-core": 0.1e12}
"""Dense bf16 tensor peak per device (vendor data sheets); a CPU core is taken at 0.1 TFLOP/s."""
UTILIZATION = {"a100-80g": 0.5, "h100-80g": 0.4, "cpu-core": 1.0}
TRAINING_BYTES = 16
"""fp32 weight, gradient and two AdamW moments per parameter."""


@dataclass(frozen=True)
class StageCost:
    """One stage of the plan."""

    index: int
    first_step: int
    until_step: int
    l1: float
    ramp: str
    tokens: int
    """Accumulated tokens at the end of the stage, as the paper's tables print them."""


@dataclass(frozen=True)
class Cost:
    """A whole run, estimated."""

    parameters: int
    tokens: int
    flops: float
    memory_bytes: int
    memory_bytes_per_device: int
    disk_bytes: int
    hours: float
    hardware: str
    assumption: str
    stages: list[StageCost]


def shape_of(model: Model) -> Shape | None:
    """The sizes of a model as far as the recipe knows them."""
    if model.shape is not None:
        return model.shape
    c = model.config
    try:
        return Shape(
            num_layers=c["num_hidden_layers"],
            d_model=c["hidden_size"],
            d_ff=c["intermediate_size"],
            vocab_size=c["vocab_size"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
            tied=c.get("tie_word_embeddings", False),
        )
    except KeyError:
        return None


def num_parameters(s: Shape) -> int:
    """Weights of a gated decoder without biases: embeddings, attention, gated FFN, norms."""
    head = s.d_model // s.num_heads
    attention = 2 * s.d_model * s.d_model + 2 * s.d_model * s.num_kv_heads * head
    layer = attention + 3 * s.d_model * s.d_ff + 2 * s.d_model
    embeddings = s.vocab_size * s.d_model * (1 if s.tied else 2)
    return s.num_layers * layer + embeddings + s.d_model


def training_flops(recipe: Recipe, s: Shape) -> float:
    """6 FLOPs per parameter and token (the lookup of an untied embedding does none), and attention's own 12 L d T."""
    multiplied = num_parameters(s) - (0 if s.tied else s.vocab_size * s.d_model)
    attention = 6 * s.num_layers * s.d_model * recipe.data.seq_len  # causal: half of 12
    return recipe.train.total_tokens * (6.0 * multiplied + attention)


def disk_bytes(recipe: Recipe, s: Shape, num_stages: int | None = None) -> int:
    """fp32 weights and AdamW moments of every stage, one checkpoint more, the dense model, the export, the corpora."""
    parameters = num_parameters(s)
    stages = ((num_stages or len(recipe.train.stages)) + 1) * 12 * parameters
    return stages + 8 * parameters + sum(source.max_tokens for source in recipe.data.sources) * 8


def memory_bytes(recipe: Recipe, s: Shape, num_devices: int) -> tuple[int, int]:
    """(in all, per device): weights, gradients and moments sharded; activations of one micro-batch on every device."""
    states = TRAINING_BYTES * num_parameters(s)
    sequences = recipe.train.micro_batch or recipe.train.tokens_per_step // recipe.data.seq_len
    tokens = max(1, sequences // num_devices) * recipe.data.seq_len
    if num_devices > 1:
        tokens = recipe.data.seq_len  # one sequence a device and accumulation, as large models are trained
        per_layer = tokens * s.d_model * 2  # activation checkpointing keeps the layers' inputs
    else:
        per_layer = tokens * (14 * s.d_model + 5 * s.d_ff) * 4
    activations = s.num_layers * per_layer + tokens * s.vocab_size * 4 * 3
    return states + num_devices * activations, states // num_devices + activations


def comparison_cost(recipe: Recipe, shape: Shape, tokens_per_s: float | None = None) -> Cost:
    """The estimate for every setting of ``recipe.compare``; see :func:`cost`."""
    one = cost(recipe, shape, tokens_per_s)
    num_stages, tokens = settings.training_of(settings.rows(recipe), recipe.seed)
    more = tokens / one.tokens
    return replace(
        one,
        tokens=tokens,
        flops=one.flops * more,
        hours=one.hours * more,
        disk_bytes=disk_bytes(recipe, shape, num_stages),
    )


def cost(recipe: Recipe, shape: Shape, tokens_per_s: float | None = None) -> Cost:
    """The estimate for a recipe.

    Args:
        tokens_per_s: measured training speed of an earlier run of this model on this machine, when there is one.
    """
    hardware = recipe.hardware or Hardware(device="cpu-core", count=2)
    flops = training_flops(recipe, shape)
    rate = hardware.count * PEAK_FLOPS[hardware.device] * UTILIZATION[hardware.device]
    seconds = flops / rate
    assumption = (
        f"{PEAK_FLOPS[hardware.device] / 1e12:g} TFLOP/s a device at {UTILIZATION[hardware.device]:.0%} utilization"
    )
    if tokens_per_s:
        seconds = recipe.train.total_tokens / tokens_per_s
        assumption = f"{tokens_per_s:.0f} tokens/s, measured in an earlier run here"
    total, per_device = memory_bytes(recipe, shape, hardware.count if hardware.device != "cpu-core" else 1)
    stages, before = [], 0
    for index, stage in enumerate(recipe.train.stages):
        tokens = stage.until_step * recipe.train.tokens_per_step
        stages.append(StageCost(index, before + 1, stage.until_step, stage.l1, stage.ramp, tokens))
        before = stage.until_step
    return Cost(
        parameters=num_parameters(shape),
        tokens=recipe.train.total_tokens,
        flops=flops,
        memory_bytes=total,
        memory_bytes_per_device=per_device,
        disk_bytes=disk_bytes(recipe, shape),
        hours=seconds / 3600,
        hardware=f"{hardware.count} x {hardware.device}",
        assumption=assumption,
        stages=stages,
    )
