"""The plan: sizes as transformers counts them, memory as torch keeps it, ways out that really are ones."""

from __future__ import annotations

import shlex
from typing import Any

import memory_runs
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flows import cli
from flows.plan_table import cost_rows, preparation_rows
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.loss import next_token_loss
from prosparse_core.planning import cost as planning
from prosparse_core.planning.hardware import DEVICES, GPUS, find_device
from prosparse_core.planning.layout import Asked, lay_out
from prosparse_core.planning.memory import layer_bytes
from prosparse_core.planning.shapes import Weights
from prosparse_core.precision import autocast
from prosparse_core.recipe_machine import Shape
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.substitute import use_relu

SHAPE = Shape(num_layers=3, d_model=96, d_ff=250, vocab_size=512, num_heads=6, num_kv_heads=2)
NAMES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "tie_word_embeddings": "tied",
}


def model_of(shape: Shape, model_type: str = "llama", device: str = "cpu") -> Any:
    config = AutoConfig.for_model(model_type, **{ours: getattr(shape, name) for ours, name in NAMES.items()})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "gated"), [("llama", True), ("gpt_neox", False)])
def test_weights_are_those_of_the_model(tied: bool, model_type: str, gated: bool) -> None:
    shape = SHAPE.model_copy(update={"tied": tied, "gated": gated, "num_kv_heads": 2 if gated else 6})
    model = model_of(shape, model_type, "meta")
    named = [(n, p.numel()) for n, p in model.named_parameters() if not n.endswith("bias")]
    assert Weights.of(shape).all == sum(numel for _, numel in named)


def test_the_extrapolated_model_is_as_large_as_the_one_it_is_named_after() -> None:
    assert Weights.of(recipes.load("llama2-70b").model.shape or SHAPE).all == 68_976_648_192


def kept_bytes(shape: Shape, precision: Any, tokens: torch.Tensor) -> int:
    """Distinct bytes that autograd keeps for the backward pass of our loss, the weights themselves left out."""
    torch.manual_seed(0)
    model = model_of(shape).train()
    use_relu(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with L1Regularizer(model, L1Reduction()) as regularizer:
        regularizer.l1_lambda = 1.0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast(precision):
                logits = model(input_ids=tokens, use_cache=False).logits
            next_token_loss(logits, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_what_the_plan_says(precision: Any) -> None:
    """One more layer keeps exactly that much more, but for a few numbers a token."""
    tokens = torch.randint(0, 512, (2, 96))
    more = kept_bytes(SHAPE.model_copy(update={"num_layers": 4}), precision, tokens)
    one = more - kept_bytes(SHAPE, precision, tokens)
    casts = 2 * Weights.of(SHAPE).layer_matrices if precision == "bf16" else 0
    planned = layer_bytes(SHAPE, tokens.numel(), precision) + casts
    assert planned == pytest.approx(one, rel=0.01)
    assert planned <= one


@pytest.mark.slow
@pytest.mark.parametrize("case", [memory_runs.CASES[0], memory_runs.CASES[3]], ids=lambda c: f"{c.name}-{c.precision}")
def test_the_peak_of_a_process_that_trains_is_within_15_percent(case: memory_runs.Case) -> None:
    """``make memory`` does this at three sizes."""
    assert memory_runs.estimate(case)[0] == pytest.approx(memory_runs.measure(case), rel=0.15)


@pytest.mark.parametrize(
    "arguments",
    [
        "llama2-7b --gpus 1",
        "llama2-7b --gpu a100-40g --gpus 8 --micro-batch 8",
        "llama2-7b --gpu rtx4090 --gpus 8",
        "llama2-13b --gpu l40s --gpus 8 --parallel ddp",
        "llama2-70b --gpu a100-80g --gpus 8",
        "minicpm-1b --gpu rtx3090 --gpus 8",
    ],
)
def test_every_way_out_fits_when_it_is_taken(arguments: str) -> None:
    def plan(words: str) -> planning.Cost:
        parsed = cli.build_parser().parse_args(["plan", *shlex.split(words)])
        recipe = recipes.load(parsed.recipe)
        asked = Asked(**{name: getattr(parsed, name) for name in Asked.__dataclass_fields__})
        shape = planning.shape_of(recipe.model)
        assert shape is not None
        return planning.cost(recipe, shape, asked=asked)

    cost = plan(arguments)
    assert not cost.fit.fits
    assert cost.fit.ways_out
    for way in cost.fit.ways_out:
        assert plan(f"{arguments} {way}").fit.fits, way


def test_sharding_and_checkpointing_save_what_they_are_for() -> None:
    recipe = recipes.load("llama2-7b")
    shape = planning.shape_of(recipe.model)
    assert shape is not None

    def terms(**asked: Any) -> dict[str, int]:
        return planning.cost(recipe, shape, asked=Asked(gpu="b200", **asked)).memory.terms

    ddp, fsdp = terms(gpus=8, parallel="ddp"), terms(gpus=8, parallel="fsdp")
    assert fsdp["optimizer"] == pytest.approx(ddp["optimizer"] / 8, abs=1)
    assert fsdp["activations"] == ddp["activations"]
    checkpointed = terms(gpus=8, parallel="fsdp", gradient_checkpointing=True)
    assert checkpointed["activations"] < fsdp["activations"] / 10
    whole, part = terms(gpus=8, parallel="fsdp", micro_batch=4), fsdp
    assert whole["activations"] == pytest.approx(4 * part["activations"], rel=1e-6)


def prepared(overrides: list[str], asked: Asked = Asked(), name: str = "llama2-7b") -> planning.Cost:  # noqa: B008
    recipe = recipes.load(name, overrides)
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    return planning.cost(recipe, shape, asked=asked)


def test_preparing_the_mixture_takes_hours_by_tokens_and_processes() -> None:
    on_disk = [f"data.sources.{i}.stream=false" for i in range(4)]
    sizes = [f"data.sources.{i}.max_tokens={n}000000000" for i, n in enumerate((12, 6, 12, 4))]
    found = prepared([*on_disk, *sizes, "runtime.data_processes=1"])
    assert found.preparation.hours == pytest.approx(34e9 / 239e3 / 3600)
    assert found.preparation.hours == pytest.approx(39.5, abs=0.1), "40 CPU-hours for 34 B"
    assert found.preparation.streamed_tokens == 0
    assert preparation_rows(found.preparation) == [
        ["mixture hours, before training",
         "39.5 (34.00 B tokens at most, 1 process, 239 K tokens a second and process)"]
    ]  # fmt: skip
    eight = prepared([*on_disk, *sizes, "runtime.data_processes=8"]).preparation
    assert eight.hours == pytest.approx(found.preparation.hours / 8)
    assert prepared([*on_disk, *sizes]).preparation.processes == 16, "a node with GPUs has the cores"
    measured_only = prepared([*on_disk, *sizes, "data.sources.0.weight=0"]).preparation
    assert measured_only.tokens == 22_000_000_000


def test_streams_are_prepared_beside_training_and_may_make_it_wait() -> None:
    cost = prepared(["data.sources.1.stream=false"])
    found = cost.preparation
    assert found.tokens == 400_000_000
    assert (
        found.streamed_tokens == cost.tokens - cost.corpora["wikipedia"] == pytest.approx(0.85 * cost.tokens, rel=1e-3)
    )
    assert found.streamed_tokens_per_s == pytest.approx(found.streamed_tokens / cost.hours / 3600)
    assert found.keeps_up
    (before, beside) = preparation_rows(found)
    assert before[0] == "mixture hours, before training"
    assert beside[1].startswith("29.40 B tokens streamed, 16 processes make 3.82 M tokens/s of the ")
    slow = prepared(["runtime.data_processes=1"], Asked(gpu="b200", gpus=8, nodes=8)).preparation
    assert not slow.keeps_up
    assert slow.stream_hours == pytest.approx(34.603e9 / 239e3 / 3600, rel=1e-3)
    assert "training waits, 40.2 hours" in preparation_rows(slow)[0][1]


def test_more_gpus_take_less_time_and_checkpointing_a_third_more() -> None:
    recipe = recipes.load("llama2-7b")
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    eight = planning.cost(recipe, shape, asked=Asked(gpus=8, parallel="fsdp"))
    more = planning.cost(recipe, shape, asked=Asked(gpus=8, nodes=2, parallel="fsdp"))
    again = planning.cost(recipe, shape, asked=Asked(gpus=8, parallel="fsdp", gradient_checkpointing=True))
    assert more.hours == pytest.approx(eight.hours / 2)
    assert again.hours == pytest.approx(eight.hours * 4 / 3, rel=0.01)
    assert eight.flops == more.flops == again.flops


def test_a_comparison_costs_what_its_rows_train_once() -> None:
    recipe = recipes.load("smollm2-135m-compare")
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    one, all_ = planning.cost(recipe, shape), planning.comparison_cost(recipe, shape)
    assert all_.tokens > 5 * one.tokens
    assert all_.disk.stages["all"] > 5 * one.disk.stages["all"]
    assert all_.disk.stages["last"] < all_.disk.stages["all"]


def test_a_comparison_counts_the_text_that_is_only_read() -> None:
    """2 rows without thresholds and 1 with: 3 corpora of 2,048 tokens each, and 6 + 4 thresholds on as many; forward
    alone is a third of a training step."""
    recipe = recipes.load("tiny", ["compare.settings=[original, vanilla_relu]"])
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    one, all_ = planning.cost(recipe, shape), planning.comparison_cost(recipe, shape)
    assert one.measuring_hours == 0, "a run of the main path is not told of"
    read = 3 * 2048 * (3 + 10)
    assert all_.measuring_hours == pytest.approx(one.hours * read / 3 / one.tokens)


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        (Asked(gpu="h100"), "unknown device 'h100'", "h100-80g"),
        (Asked(gpu="a100"), "unknown device 'a100'", "a100-40g or a100-80g"),
        (Asked(gpu="rtx4080"), "unknown device 'rtx4080'", "rtx4090"),
        (Asked(gpus=7), "7 ranks do not divide the 512 sequences", "8 ranks would"),
        (Asked(gpus=8, nodes=3), "24 ranks do not divide", "16"),
        (Asked(micro_batch=5), "a micro batch of 5 does not divide the 64 sequences", "4"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(asked: Asked, message: str, hint: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        lay_out(recipes.load("llama2-7b"), asked)
    assert hint in (caught.value.hint or "")


def test_a_cpu_has_cores_and_no_gpus() -> None:
    with pytest.raises(BadInput, match="about GPUs"):
        lay_out(recipes.load("smollm2-135m"), Asked(gpus=2))
    layout, _ = lay_out(recipes.load("smollm2-135m"))
    assert (layout.world, layout.count, layout.parallel) == (1, 2, "single")


def test_devices_are_found_as_people_write_them() -> None:
    assert find_device("A100-80GB").name == "a100-80g"
    assert find_device("RTX 4090").name == "rtx4090"
    assert all(gpu.source and gpu.peak_flops > 5e13 and gpu.bytes_per_s > 2e11 for gpu in GPUS)
    assert {"a100-40g", "a100-80g", "h100-80g", "h200", "l40s", "rtx4090"} <= set(DEVICES)


def test_the_extrapolated_recipe_says_that_it_is_one_and_plans_on_64_gpus() -> None:
    recipe = recipes.load("llama2-70b")
    assert "extrapolation" in recipe.description
    assert "not calibrated" in recipe.description
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    cost = planning.cost(recipe, shape, asked=Asked(gpu="h100-80g", gpus=8, nodes=8))
    assert cost.fit.fits
    assert cost.layout.parallel == "fsdp"
    assert cost.keep == "last"


def test_the_plan_tells_each_stages_rate_and_corpora_and_what_is_taken_of_each() -> None:
    recipe = recipes.load("minicpm-1b")
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    found = planning.cost(recipe, shape)
    decay, sft = found.stages[-2:]
    assert (decay.phase, sft.phase) == ("decay", "sft")
    assert decay.mixture["ultrachat"] == pytest.approx(0.15)
    assert sft.mixture == {"ultrachat": 1}
    assert "ultrachat" not in found.stages[0].mixture
    assert found.stages[0].lr == pytest.approx((1e-6, 1e-4))
    assert decay.lr == pytest.approx((1e-4 * 0.5 ** (1 / 5000), 1e-5))
    assert sum(found.corpora.values()) == recipe.train.total_tokens
    step = recipe.train.tokens_per_step
    assert found.corpora["ultrachat"] == pytest.approx((0.15 * 60_000 + 6_000) * step, rel=1 / 1024 / 0.15)


def test_the_plan_says_what_checkpoints_cost() -> None:
    """Two percent of the time at most; llama2-7b's 75 GiB every five minutes would have been a quarter of it."""
    recipe = recipes.load("llama2-7b")
    shape = planning.shape_of(recipe.model)
    assert shape is not None
    cost = planning.cost(recipe, shape)
    saving = cost.saving
    assert saving.bytes == cost.disk.checkpoint == 12 * cost.parameters
    assert saving.share <= 0.02 + 1e-9
    assert saving.interval_s >= saving.blocking_s + saving.write_s
    assert saving.number == int(cost.hours * 3600 / saving.interval_s) > 10
    assert cost.memory.host_bytes >= saving.bytes
    tight = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"checkpoint_overhead": 0.001})})
    assert planning.cost(tight, shape).saving.interval_s == pytest.approx(saving.blocking_s / 0.001)
    fixed = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"checkpoint_every_minutes": 5})})
    assert planning.cost(fixed, shape).saving.interval_s == 300
    rows = dict(cost_rows(cost))
    assert "one every" in rows["checkpoints"]
    assert "GB/s a process" in rows["checkpoints"]


def test_on_a_cpu_the_copy_of_a_checkpoint_is_in_the_plan_and_writing_counts() -> None:
    recipe = recipes.load("smollm2-135m")
    shape = Shape(num_layers=30, d_model=576, d_ff=1536, vocab_size=49152, num_heads=9, num_kv_heads=3)
    cost = planning.cost(recipe, shape)
    assert cost.memory.terms["checkpoint copy"] == cost.saving.bytes
    assert cost.saving.interval_s == pytest.approx((cost.saving.blocking_s + cost.saving.write_s) / 0.02)
    two = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"processes": 2})})
    shared = planning.cost(two, shape).memory.terms
    assert shared["checkpoint copy"] == pytest.approx(cost.saving.bytes / 2, abs=1)


def test_a_rollback_needs_room_for_an_older_checkpoint() -> None:
    recipe = recipes.load("smollm2-135m")
    train = recipe.train.model_copy(update={"on_non_finite": "rollback"})
    plain, rolling = (planning.disk(r, SHAPE) for r in (recipe, recipe.model_copy(update={"train": train})))
    assert (plain.num_checkpoints, rolling.num_checkpoints) == (2, 3)
    assert rolling.most["all"] - plain.most["all"] in (0, plain.checkpoint)
