"""The controller against made-up models of very different scale: one rule, no retuning."""

from __future__ import annotations

import math

import pytest

from prosparse_core.steering import COURSE, START_SHARE, Steering


def simulate(steering: Steering, *, scale: float, rest: float = 0.66, noise: float = 0.003) -> list[float]:
    """A first-order plant: sparsity drifts towards a level set by lambda * scale, ever slower as training cools.

    ``scale`` stands for everything that makes a factor mean something else for another model.
    """
    sparsity, seen = rest, []
    for step in range(steering.num_steps):
        level = rest + (1 - rest) * (1 - 1 / (1 + steering.l1_lambda * scale))
        cooling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steering.num_steps))
        sparsity += 20 / steering.num_steps * cooling * (level - sparsity)
        batch = sparsity + noise * math.sin(12.9898 * step)
        steering.update(batch, lm_loss=3.0, l1=1.0)
        seen.append(sparsity)
    return seen


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("target", [0.72, 0.80, 0.89])
@pytest.mark.parametrize("num_steps", [120, 1000])
def test_it_lands_within_a_point_of_the_target_whatever_lambda_means(
    scale: float, target: float, num_steps: int
) -> None:
    seen = simulate(Steering(target, num_steps), scale=scale)
    assert seen[-1] == pytest.approx(target, abs=0.01)
    assert max(seen) < target + 0.015


def test_the_first_factor_comes_from_the_loss_and_later_ones_from_before() -> None:
    fresh = Steering(0.8, 100)
    fresh.update(0.6, lm_loss=4.0, l1=2.0)
    assert fresh.l1_lambda == pytest.approx(START_SHARE * 4.0 / 2.0)
    carried = Steering(0.8, 100, l1_lambda=0.3)
    carried.update(0.6, lm_loss=4.0, l1=2.0)
    assert carried.l1_lambda == 0.3


def test_the_course_is_half_a_sine_to_the_target_and_then_flat() -> None:
    steering = Steering(0.9, 200)
    steering.update(0.5, 1.0, 1.0)
    assert steering.course(0) == 0.5
    assert steering.course(round(COURSE * 200 / 2)) == pytest.approx(0.7)
    assert steering.course(round(COURSE * 200)) == steering.course(200) == pytest.approx(0.9)


def test_its_state_is_everything_it_needs() -> None:
    whole, broken = Steering(0.8, 60), Steering(0.8, 60)
    for step in range(60):
        if step == 30:
            broken = Steering(**broken.state())
        for one in (whole, broken):
            one.update(0.6 + 0.003 * step + 0.01 * math.sin(step), 3.0 - 0.01 * step, 1.0)
    assert whole == broken
