"""Schedules against Algorithm 1, line by line."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core import recipe as recipes
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
