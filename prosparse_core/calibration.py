"""Threshold shifting (paper, section 3.3): the FATReLU curve, and the largest thresholds within a perplexity budget.

The budget is a rise over the perplexity at threshold 0, so it can never be exceeded there: threshold 0 always fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prosparse_core.errors import BadInput
from prosparse_core.perplexity import Measured

MIXED = "mixed"
CETTS = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
"""Shares of output norm that are tried; the walk ends long before the last unless the budget is a large one."""
LEAST_STEP = 0.1
"""Of the interval, at either end: so that a curve with a corner is closed in on as well."""
GROWTH = 2.0
"""Each value behind the end of a grid is so many times the one before."""
FIRST_VALUE = 0.01
"""The first value behind a grid of nothing but 0."""
SATURATED = 1e-3
"""Sparsity that a step beyond the grid must add to be followed by another: 0.1 points."""
MAX_FRUITLESS = 12
"""Steps beyond a grid that ends far below the model's activations, where they bring nothing yet."""
Stop = Literal["budget", "saturated"]


@dataclass(frozen=True)
class Trial:
    """One threshold for all layers, or one for each, measured on every corpus."""

    threshold: float
    """The mean over layers."""
    per_corpus: Mapping[str, Measured]
    per_layer: tuple[float, ...] | None = None
    """None: the same for all layers."""
    cett: float | None = None
    """What each layer may lose of its output norm; None for the same threshold in all layers."""

    @property
    def mixed(self) -> Measured:
        """All corpora together, each by its share of the training mixture: sparsity, and log-perplexity alike."""
        parts = list(self.per_corpus.values())
        whole = sum(p.share for p in parts)
        num_tokens = sum(p.num_tokens for p in parts)
        return Measured(
            nll=num_tokens * sum(p.share / whole * p.nll / p.num_tokens for p in parts),
            num_tokens=num_tokens,
            sparsity=sum(p.share / whole * p.sparsity for p in parts),
        )


@dataclass(frozen=True)
class Curve:
    """Every trial by rising threshold, and the chosen one."""

    trials: tuple[Trial, ...]
    best: Trial
    max_ppl_increase_pct: float
    stopped_by: Stop
    """budget: the next value would exceed it. saturated: none did, but larger ones brought no more sparsity."""

    @property
    def chosen(self) -> float:
        """The threshold of the chosen trial: the mean over layers."""
        return self.best.threshold

    @property
    def sparsity_gain(self) -> float:
        """What the chosen trial adds to the sparsity at threshold 0."""
        return self.best.mixed.sparsity - self.trials[0].mixed.sparsity

    def increase_pct(self, trial: Trial) -> float:
        """The rise of the mixture's perplexity over threshold 0, in per cent."""
        return increase_pct(trial, self.trials[0])


def increase_pct(trial: Trial, base: Trial) -> float:
    """How much the perplexity of all corpora together rose over ``base``, in per cent."""
    return 100 * (trial.mixed.perplexity / base.mixed.perplexity - 1)


def calibrate(
    measure: Callable[[float], Mapping[str, Measured]],
    thresholds: Sequence[float],
    max_ppl_increase_pct: float,
    refine: int = 4,
) -> Curve:
    """The curve over a grid of thresholds and the largest threshold within the budget.

    The grid is walked upwards until perplexity has risen by three times the budget (and at least 3 %). Where it ends
    within the budget, thresholds are doubled until one is beyond it or sparsity saturates. The interval between the
    last threshold within the budget and the first beyond it is then narrowed ``refine`` times, each time where a
    straight line between the two meets the budget: the curve bends upwards, so that is mostly within it. Where nothing
    but 0 is within the budget, thresholds are halved until one is, or brings no sparsity.

    Args:
        measure: threshold -> one measurement per corpus, on calibration data.
        thresholds: rising, starting with 0.
        max_ppl_increase_pct: the budget, in per cent of the mixture's perplexity over threshold 0.
        refine: how often to narrow.

    Raises:
        BadInput: the perplexity at threshold 0 is not a finite number.
    """
    return _search(lambda t: Trial(t, measure(t)), thresholds, max_ppl_increase_pct, refine)


def calibrate_cett(
    measure: Callable[[Sequence[float]], Mapping[str, Measured]],
    thresholds_at: Callable[[float], Sequence[float]],
    base: Trial,
    max_ppl_increase_pct: float,
    refine: int = 4,
    cetts: Sequence[float] = CETTS,
) -> Curve:
    """CETT-PPL-p % (arXiv 2411.02335, Algorithm 1) for thresholds on the gate: the largest CETT within the budget.

    The search is that of :func:`calibrate` over CETT, the share of output norm that every layer may lose.

    Args:
        measure: one threshold per layer -> one measurement per corpus, on calibration data.
        thresholds_at: CETT -> one threshold per layer.
        base: the trial at threshold 0, measured already.
        cetts: rising, starting with 0.
    """
    num_layers = len(thresholds_at(0.0))
    zero = (0.0,) * num_layers
    tried = {zero: Trial(0.0, base.per_corpus, zero, 0.0)}

    def trial(cett: float) -> Trial:
        """Two CETTs may lead to the same thresholds: these are measured once and keep the first one's name."""
        per_layer = zero if cett == 0 else tuple(thresholds_at(cett))
        if per_layer not in tried:
            tried[per_layer] = Trial(sum(per_layer) / num_layers, measure(per_layer), per_layer, cett)
        return tried[per_layer]

    return _search(trial, cetts, max_ppl_increase_pct, refine, most=1.0)


def _search(
    try_: Callable[[float], Trial],
    values: Sequence[float],
    max_increase_pct: float,
    refine: int,
    most: float = math.inf,
) -> Curve:
    """Walk ``values`` (rising, the first is the base) up and on, then narrow the interval in which the budget ends.

    Args:
        most: where values end.
    """
    tried: list[tuple[float, Trial]] = []

    def add(value: float) -> Trial:
        tried.append((value, try_(value)))
        return tried[-1][1]

    base = add(values[0])
    if not math.isfinite(base.mixed.perplexity):
        raise BadInput(
            f"the perplexity at threshold 0 is {base.mixed.perplexity}: there is nothing to calibrate against",
            hint="the training diverged or the checkpoint is damaged: look at its loss",
        )

    def within(trial: Trial) -> bool:
        return increase_pct(trial, base) <= max_increase_pct

    for value in values[1:]:
        if increase_pct(add(value), base) > max(3 * max_increase_pct, 3.0):
            break
    useful = len(tried)
    if all(within(trial) for _, trial in tried):
        useful = _go_on(tried, add, within, most)
    # Perplexity may dip and rise; "largest" means before the first value that breaks the budget.
    beyond = next((i for i, (_, trial) in enumerate(tried) if not within(trial)), useful)
    low, best = tried[beyond - 1]
    is_bounded = beyond < useful
    if is_bounded:
        high, too_much = tried[beyond]
        for _ in range(refine):
            under, over = (increase_pct(trial, base) for trial in (best, too_much))
            share = (max_increase_pct - under) / (over - under)
            middle = low + min(max(share, LEAST_STEP), 1 - LEAST_STEP) * (high - low)
            trial = add(middle)
            if within(trial):
                low, best = middle, trial
            else:
                high, too_much = middle, trial
        while best is base and too_much.mixed.sparsity - base.mixed.sparsity >= SATURATED:
            high /= GROWTH
            trial = add(high)
            if within(trial):
                best = trial
            else:
                too_much = trial
    trials = {id(trial): trial for _, trial in tried}.values()
    return Curve(
        tuple(sorted(trials, key=lambda t: t.threshold)),
        best,
        max_increase_pct,
        stopped_by="budget" if is_bounded else "saturated",
    )


def _go_on(
    tried: list[tuple[float, Trial]], add: Callable[[float], Trial], within: Callable[[Trial], bool], most: float
) -> int:
    """Try larger values until one is beyond the budget, no x1 is left, or a step brings no more sparsity.

    A grid may end far below the model's activations: only behind a step that brought something, or many, is one that
    brings nothing the end.

    Returns:
        How many of ``tried`` brought something, those of the grid included: the others cost and bring nothing.
    """
    gained = tried[-1][1].mixed.sparsity - tried[0][1].mixed.sparsity >= SATURATED
    useful = len(tried)
    while tried[-1][1].mixed.sparsity < 1:
        value, last = tried[-1]
        trial = add(min(GROWTH * value, (value + most) / 2) or FIRST_VALUE)
        if not within(trial):
            return len(tried)
        if trial.mixed.sparsity - last.mixed.sparsity >= SATURATED or trial.mixed.sparsity == 1:
            gained, useful = True, len(tried)
        elif gained or len(tried) - useful >= MAX_FRUITLESS:
            break
    return useful
