"""The threshold search against known curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from prosparse_core.calibration import CETTS, Trial, calibrate, calibrate_cett, increase_pct
from prosparse_core.errors import BadInput
from prosparse_core.perplexity import Measured

GRID = [0.0, 0.05, 0.1, 0.2, 0.4]


def curve_of(**rise: Callable[[float], float]) -> Callable[[float], dict[str, Measured]]:
    """Corpora whose perplexity is 10 * (1 + rise(t)), sparsity 0.5 + t up to all of x1."""
    return lambda t: {
        corpus: Measured(nll=1000 * math.log(10 * (1 + f(t))), num_tokens=1000, sparsity=min(1.0, 0.5 + t))
        for corpus, f in rise.items()
    }


def test_the_largest_threshold_within_the_budget_is_found() -> None:
    curve = calibrate(curve_of(a=lambda t: t * t), GRID, 1.0, refine=6)
    assert curve.chosen == pytest.approx(0.1, abs=1e-9)  # 0.1 ** 2 is exactly 1 %
    finer = calibrate(curve_of(a=lambda t: 2 * t * t), GRID, 1.0, refine=6)
    assert 0.0707 - 0.05 / 2**6 <= finer.chosen <= 0.0707107


@pytest.mark.parametrize("exponent", [1, 2, 5])
def test_two_more_trials_come_closer_than_halving_twice_would(exponent: float) -> None:
    curve = calibrate(curve_of(a=lambda t: 0.02 * (t / 0.1) ** exponent), GRID, 1.0, refine=2)
    wanted = 0.1 * 0.5 ** (1 / exponent)
    assert curve.increase_pct(curve.best) <= 1.0
    assert wanted - 0.05 / 4 < curve.chosen <= wanted + 1e-9


def test_a_curve_with_a_step_is_closed_in_on() -> None:
    curve = calibrate(curve_of(a=lambda t: 0.9 if t > 0.07 else 0.0), GRID, 1.0, refine=25)
    assert curve.chosen == pytest.approx(0.07, abs=1e-3)


def test_the_budget_is_the_mixtures() -> None:
    curve = calibrate(curve_of(a=lambda t: 0.0, b=lambda t: t / 5), GRID, 1.0, refine=6)
    # sqrt(1 + t / 5) = 1.01 at t = 0.1005
    assert curve.chosen == pytest.approx(0.1005, abs=0.1 / 2**5)
    chosen = next(t for t in curve.trials if t.threshold == curve.chosen)
    assert increase_pct(chosen, curve.trials[0]) <= 1.0 < increase_pct(curve.trials[-1], curve.trials[0])


def test_the_walk_stops_once_the_budget_is_far_behind() -> None:
    asked: list[float] = []

    def measure(t: float) -> dict[str, Measured]:
        asked.append(t)
        return curve_of(a=lambda t: 5 * t)(t)

    calibrate(measure, GRID, 1.0, refine=0)
    assert asked[:2] == [0.0, 0.05]
    assert max(asked) == 0.05


def test_below_the_first_threshold_there_are_others() -> None:
    """The first one beyond 0 is over the budget: nothing is used of it before smaller ones are tried."""
    for refine in (0, 2):
        curve = calibrate(curve_of(a=lambda t: 5 * t), GRID, 1.0, refine=refine)
        assert 0.001 < curve.chosen < 0.00201
        assert curve.increase_pct(curve.best) <= 1.0
        assert curve.stopped_by == "budget"
    never = calibrate(curve_of(a=lambda t: 1.0 if t > 0 else 0.0), GRID, 1.0, refine=0)
    assert (never.chosen, never.stopped_by) == (0.0, "budget")
    assert never.trials[1].mixed.sparsity - 0.5 < 1e-3, "where thresholds bring nothing the search ends"


def test_a_grid_that_ends_within_the_budget_is_gone_beyond() -> None:
    """Seen: thresholds at the end of the grid, +0.0 % used of +1 %, and nothing said."""
    for refine, least in ((0, 0.09), (4, 0.0995)):
        curve = calibrate(curve_of(a=lambda t: t * t), [0.0, 0.01, 0.03], 1.0, refine=refine)
        assert curve.stopped_by == "budget"
        assert least * (0.6 if refine == 0 else 1) < curve.chosen <= 0.1
        assert curve.increase_pct(curve.trials[-1]) > 1.0, "the one that showed where the budget ends"
    assert calibrate(curve_of(a=lambda t: t * t), [0.0], 1.0, refine=6).chosen == pytest.approx(0.1, abs=0.01)


def test_the_paper_s_grid_and_its_choice_stay_where_the_budget_ends_within_it() -> None:
    grid = [0.0, 0.005, 0.01, 0.02, 0.03]
    curve = calibrate(curve_of(a=lambda t: (t / 0.012) ** 2 / 100), grid, 1.0, refine=0)
    assert (curve.chosen, curve.stopped_by) == (0.01, "budget")
    assert {t.threshold for t in curve.trials} <= set(grid)


def test_without_a_price_the_search_ends_where_sparsity_does() -> None:
    all_zero = calibrate(curve_of(a=lambda t: -t / 100), GRID, 1.0)
    assert (all_zero.chosen, all_zero.best.mixed.sparsity, all_zero.stopped_by) == (0.8, 1.0, "saturated")

    def levelling(t: float) -> dict[str, Measured]:
        return {"a": Measured(1000.0, 1000, 0.9 * (1 - math.exp(-t / 0.05)))}

    curve = calibrate(levelling, GRID, 1.0)
    assert curve.stopped_by == "saturated"
    assert curve.chosen == 0.4, "0.8 adds less than 0.1 points: it is tried, not taken"
    assert curve.trials[-1].threshold == 0.8


def test_a_grid_far_below_the_activations_is_left_behind() -> None:
    """Activations around 50: the first doublings bring nothing, which is no saturation."""

    def far(t: float) -> dict[str, Measured]:
        return {"a": Measured(1000 * math.log(10 * (1 + (t / 100) ** 2)), 1000, 0.5 + 0.5 * float(t > 8))}

    curve = calibrate(far, GRID, 1.0, refine=8)
    assert curve.stopped_by == "budget"
    assert 8 < curve.chosen <= 10
    dense = calibrate(lambda t: {"a": Measured(1000.0, 1000, 0.0)}, GRID, 1.0)
    assert (dense.chosen, dense.stopped_by) == (0.4, "saturated")
    assert dense.trials[-1].threshold == 0.4 * 2**12


def test_corpora_count_by_their_share_of_the_mixture() -> None:
    parts = {"a": Measured(100.0, 50, 0.8, share=0.75), "b": Measured(400.0, 100, 0.4, share=0.25)}
    mixed = Trial(0.0, {**parts, "c": Measured(9000.0, 900, 0.1, share=0.0)}).mixed
    assert mixed.perplexity == pytest.approx(math.exp(0.75 * 2 + 0.25 * 4))
    assert mixed.sparsity == pytest.approx(0.75 * 0.8 + 0.25 * 0.4)
    assert mixed.num_tokens == 1050


def test_a_dip_after_the_budget_was_broken_is_not_taken() -> None:
    bumpy = {0.0: 0.0, 0.05: 0.0, 0.1: 0.02, 0.2: 0.005, 0.4: 1.0}
    curve = calibrate(curve_of(a=lambda t: bumpy.get(t, 0.02)), GRID, 1.0, refine=2)
    assert curve.chosen == 0.05


def test_trials_are_sorted_and_mixed_counts_every_token_once() -> None:
    curve = calibrate(curve_of(a=lambda t: t, b=lambda t: t), GRID, 1.0, refine=3)
    assert [t.threshold for t in curve.trials] == sorted(t.threshold for t in curve.trials)
    assert curve.trials[0].mixed.num_tokens == 2000
    assert curve.trials[0].mixed.perplexity == pytest.approx(10.0)


def test_a_perplexity_that_is_no_number_cannot_be_calibrated_against() -> None:
    with pytest.raises(BadInput, match="threshold 0 is nan"):
        calibrate(lambda t: {"a": Measured(math.nan, 10, 0.5)}, GRID, 1.0)


def test_a_budget_of_zero_keeps_threshold_zero_at_least() -> None:
    curve = calibrate(curve_of(a=lambda t: t), GRID, 0.0, refine=2)
    assert (curve.chosen, curve.sparsity_gain) == (0.0, 0.0)


class Layers:
    """Two layers, the second twice as tolerant; perplexity rises with the square of the mean threshold."""

    def __init__(self, step: float = 0.0) -> None:
        self.asked: list[tuple[float, ...]] = []
        self.step = step

    def thresholds_at(self, cett: float) -> list[float]:
        cett = math.floor(cett / self.step) * self.step if self.step else cett
        return [cett, 2 * cett]

    def measure(self, per_layer: Sequence[float]) -> dict[str, Measured]:
        self.asked.append(tuple(per_layer))
        return curve_of(a=lambda t: t * t)(sum(per_layer) / 2)


def test_the_largest_cett_within_the_budget() -> None:
    layers = Layers()
    base = Trial(0.0, curve_of(a=lambda t: 0.0)(0.0))
    curve = calibrate_cett(layers.measure, layers.thresholds_at, base, 1.0, refine=7)
    best = curve.best
    assert best.cett == pytest.approx(0.1 / 1.5, abs=0.05 / 2**7)  # (1.5 c) ** 2 is 1 % at c = 0.0667
    assert curve.increase_pct(best) <= 1.0
    assert best.per_layer == (best.cett, 2 * best.cett)
    assert curve.chosen == best.threshold == pytest.approx(1.5 * best.cett)
    assert curve.sparsity_gain == pytest.approx(curve.chosen)
    first = curve.trials[0]
    assert (first.threshold, first.cett, first.per_layer) == (0.0, 0.0, (0.0, 0.0))
    assert first.per_corpus is base.per_corpus
    assert (0.0, 0.0) not in layers.asked, "threshold 0 was measured already"
    assert [t.threshold for t in curve.trials] == sorted(t.threshold for t in curve.trials)


def test_equal_thresholds_are_measured_once() -> None:
    layers = Layers(step=0.04)
    curve = calibrate_cett(layers.measure, layers.thresholds_at, Trial(0.0, layers.measure((0.0, 0.0))), 1.0, refine=6)
    assert len(layers.asked) == len(set(layers.asked))
    assert len({t.threshold for t in curve.trials}) == len(curve.trials)
    assert curve.best.per_layer == pytest.approx((0.04, 0.08))


def test_a_budget_that_is_never_reached_takes_the_last_cett() -> None:
    layers = Layers()
    flat = Trial(0.0, curve_of(a=lambda t: 0.0)(0.0))
    curve = calibrate_cett(lambda per_layer: flat.per_corpus, layers.thresholds_at, flat, 1.0)
    assert curve.best.cett == CETTS[-1]
    assert curve.stopped_by == "saturated"


def test_a_cett_beyond_the_grid_and_one_below_it() -> None:
    layers = Layers()
    base = Trial(0.0, curve_of(a=lambda t: 0.0)(0.0))
    for grid in ([0.0, 0.01], [0.0, 0.9]):
        curve = calibrate_cett(layers.measure, layers.thresholds_at, base, 1.0, refine=0, cetts=grid)
        assert curve.stopped_by == "budget"
        assert curve.best.cett is not None
        assert 0.03 < curve.best.cett <= 0.0667
