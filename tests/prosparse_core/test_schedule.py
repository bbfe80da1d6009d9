"""Schedules against Algorithm 1, line by line."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.recipe_train import Stage, Train
from prosparse_core.schedule import first_step, l1_lambda, learning_rate, stage_of


def algorithm_1(factors: list[float], ends: list[int]) -> list[float]:
    """The loop of the paper's App. B, as printed; ends[0] is where stage 0 (lambda 0) ends."""
    values = [0.0] * ends[0]
    values += [factors[1]] * (ends[1] - ends[0])
    for i in range(2, len(factors)):
        for t in range(ends[i - 1] + 1, ends[i] + 1):
            eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * (t - ends[i - 1]) / (ends[i] - ends[i - 1])) + 1)
            values.append(factors[i - 1] + eta * (factors[i] - factors[i - 1]))
    return values


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    rises=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_lambda_is_algorithm_1(lengths: list[int], rises: list[float]) -> None:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    factors = [0.0] + [sum(rises[: i + 1]) for i in range(1, len(lengths))]
    ramps = ["constant", "constant"] + ["sine"] * (len(lengths) - 2)
    stages = [Stage(until_step=t, l1=v, ramp=r) for t, v, r in zip(ends, factors, ramps, strict=True)]  # type: ignore[arg-type]
    ours = [l1_lambda(stages, step) for step in range(1, ends[-1] + 1)]
    assert ours == pytest.approx(algorithm_1(factors, ends), abs=1e-12)
    assert all(a <= b + 1e-12 for a, b in pairwise(ours))


def test_lambda_in_the_middle_of_a_sine_stage_is_the_mean() -> None:
    stages = recipes.load("llama2-7b").train.stages
    assert l1_lambda(stages, 8000) == pytest.approx((5e-3 + 5e-2) / 2, rel=1e-12)
    assert l1_lambda(stages, 14000) == pytest.approx((5e-2 + 2e-1) / 2, rel=1e-12)
    assert l1_lambda(stages, 6001) > 5e-3


def test_stages_and_steps_agree() -> None:
    stages = recipes.load("llama2-7b").train.stages
    assert [first_step(stages, i) for i in range(3)] == [1, 5001, 6001]
    assert [stage_of(stages, s) for s in (1, 5000, 5001, 6000, 6001, 16500)] == [0, 0, 1, 1, 2, 5]
    with pytest.raises(ValueError, match="beyond the last stage"):
        stage_of(stages, 16501)


WSD: dict[str, Any] = {
    "tokens_per_step": 1,
    "lr": 1.0,
    "schedule": "wsd",
    "lr_min_ratio": 0.125,
    "warmup_steps": 4,
    "stages": [
        {"until_step": 10, "l1": 0},
        {"until_step": 14, "l1": 0.1, "lr": 0.5, "warmup_steps": 2},
        {"until_step": 20, "l1": 0.1, "phase": "decay"},
        {"until_step": 26, "l1": 0.1, "phase": "decay", "lr": 0.25, "half_life": 2, "warmup_steps": 1},
        {"until_step": 30, "l1": 0.05, "phase": "sft", "lr": 0.25, "warmup_steps": 2},
        {"until_step": 34, "l1": 0.05, "phase": "sft", "lr": 0.5, "half_life": 1},
    ],
}


def rates(**changes: Any) -> list[float]:
    train = Train.model_validate({**WSD, **changes})
    return [learning_rate(train, step) for step in range(1, train.total_steps + 1)]


def test_wsd_warms_up_stays_falls_and_begins_anew() -> None:
    root = math.sqrt(0.5)
    assert rates() == pytest.approx([
        0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1,
        0.25, 0.5, 0.5, 0.5,
        root, 0.5, 0.5 * root, 0.25, 0.25 * root, 0.125,  # 0.125 = 0.5^3 in six steps: it halves every two
        0.25, 0.25 * root, 0.125, 0.125 * root, 0.0625, 0.0625 * root,
        0.125, 0.25, 0.25, 0.25,
        0.25, 0.125, 0.0625, 0.0625,  # never below an eighth
    ])  # fmt: skip


def test_minicpms_published_fall() -> None:
    """arXiv 2404.06395, section 4.2: f(s - S) = 0.5^((s - S) / T), T = 5,000 steps."""
    stages = [{"until_step": 1000, "l1": 0}, {"until_step": 21000, "l1": 0, "phase": "decay", "half_life": 5000}]
    found = rates(lr=0.01, lr_min_ratio=0, warmup_steps=0, stages=stages)
    assert found[:1000] == [0.01] * 1000
    for step in (1001, 3500, 6000, 11000, 21000):
        assert found[step - 1] == pytest.approx(0.01 * 0.5 ** ((step - 1000) / 5000), rel=1e-12)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    peaks=st.lists(st.floats(1e-5, 1) | st.none(), min_size=5, max_size=5),
    warm=st.lists(st.integers(0, 30), min_size=5, max_size=5),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    run_warm=st.integers(0, 40),
)
def test_learning_rate_is_a_loop_that_remembers(
    lengths: list[int], peaks: list[float | None], warm: list[int], schedule: str, run_warm: int
) -> None:
    stages: list[dict[str, Any]] = []
    last = 0
    for i, length in enumerate(lengths):
        last += length
        own = {"lr": peaks[i], "warmup_steps": min(warm[i], length) if i else 0}
        stages.append({"until_step": last, "l1": 0, **own})
    if schedule == "wsd":
        run_warm = min(run_warm, last)
        stages.append({"until_step": last + 9, "l1": 0, "phase": "decay"})
    train = Train.model_validate(
        {"tokens_per_step": 1, "lr": 0.3, "schedule": schedule, "warmup_steps": run_warm, "stages": stages}
    )
    expected, step = [], 0
    for stage in train.stages:
        peak, begin = stage.lr or 0.3, step
        rate = peak
        while step < stage.until_step:
            step += 1
            if step <= run_warm:
                now = peak * step / run_warm
            elif schedule == "cosine":
                through = (step - run_warm) / (train.total_steps - run_warm)
                now = 0.1 * peak + 0.9 * peak * (1 + math.cos(math.pi * through)) / 2
            elif stage.phase == "decay":
                rate *= 0.1 ** (1 / 9)
                now = rate
            else:
                now = peak
            expected.append(now * min(1, (step - begin) / stage.warmup_steps) if stage.warmup_steps else now)
    assert [learning_rate(train, s) for s in range(1, train.total_steps + 1)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.schedule=wsd"], "schedule: wsd needs a stage with phase: decay"),
        (["train.schedule=constant", "train.stages.3.phase=decay"], "use schedule: wsd"),
        (["train.schedule=wsd", "train.stages.3.phase=decay", "train.lr_min_ratio=0"], "does not reach lr_min_ratio=0"),
        (["train.schedule=wsd", "train.stages.2.phase=decay"], "stages[3].lr is missing"),
        (
            ["train.schedule=wsd", "train.stages.3.phase=decay", "train.warmup_steps=46"],
            "falls before train.warmup_steps",
        ),
        (["train.stages.3.half_life=3"], "only with schedule: wsd"),
        (["train.stages.3.warmup_steps=16"], "more than the stage's 15 steps"),
        (["train.stages.0.warmup_steps=2"], "the run's warm-up is train.warmup_steps"),
        (["train.stages.3.lr=0"], "greater than 0"),
        (["train.schedule=cosin"], "did you mean 'cosine'?"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        recipes.load("tiny", overrides)
    assert message in str(caught.value)


def test_learning_rate_is_one_cosine_over_the_whole_run() -> None:
    train = Train(tokens_per_step=1, lr=1.0, lr_min_ratio=0.1, warmup_steps=10, stages=[Stage(until_step=110, l1=0)])
    assert learning_rate(train, 1) == pytest.approx(0.1)
    assert learning_rate(train, 10) == pytest.approx(1.0)
    assert learning_rate(train, 60) == pytest.approx(0.55)
    assert learning_rate(train, 110) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ramp", "halfway"), [("sine", 0.26), ("linear", 0.26), ("exponential", math.sqrt(0.02 * 0.5)), ("constant", 0.5)]
)
def test_every_ramp_ends_at_its_factor_and_passes_its_middle(ramp: str, halfway: float) -> None:
    stages = [
        Stage(until_step=10, l1=0),
        Stage(until_step=20, l1=0.02),
        Stage(until_step=120, l1=0.5, ramp=ramp),  # type: ignore[arg-type]
    ]
    assert l1_lambda(stages, 20) == 0.02
    assert l1_lambda(stages, 70) == pytest.approx(halfway)
    assert l1_lambda(stages, 120) == 0.5
    values = [l1_lambda(stages, step) for step in range(20, 121)]
    assert all(a <= b for a, b in pairwise(values))


def test_a_steered_stage_has_no_factor_of_its_own() -> None:
    stages = [Stage(until_step=10, l1=0), Stage.model_validate({"until_step": 20, "target_sparsity": 0.8})]
    assert [l1_lambda(stages, step) for step in (10, 11, 20)] == [0, 0, 0]


def test_minicpms_recipe_decays_with_mixed_data_and_ends_on_instructions_alone() -> None:
    recipe = recipes.load("minicpm-1b")
    train = recipe.train
    weights = {source.name: source.weight for source in recipe.data.sources}
    assert weights["ultrachat"] == 0
    assert [(s.phase, s.mixture and s.mixture.get("ultrachat")) for s in train.stages[-3:]] == [
        ("prosparse", None), ("decay", 0.15), ("sft", 1),
    ]  # fmt: skip
    assert set(train.stages[-2].mixture or {}) == set(weights)
    assert list(train.stages[-1].mixture or {}) == ["ultrachat"]
    assert [learning_rate(train, s) for s in (50, 100, 35_000, 40_000, 45_000, 95_000, 95_050, 95_100, 101_000)] == (
        pytest.approx([5e-5, 1e-4, 1e-4, 5e-5, 2.5e-5, 1e-5, 5e-6, 1e-5, 1e-5])
    )


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-13b", "llama2-70b"])
def test_the_llama_recipes_warm_up_after_the_cliff(name: str) -> None:
    train = recipes.load(name).train
    assert train.schedule == "cosine"
    assert [learning_rate(train, s) / train.lr for s in (1, 50, 100)] == pytest.approx([0.01, 0.5, 1])
    assert learning_rate(train, train.total_steps) == 0
