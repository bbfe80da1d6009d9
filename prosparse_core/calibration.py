"""Threshold shifting (paper, section 3.3): the FATReLU curve, and the largest threshold within a perplexity budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prosparse_core.perplexity import Measured

MIXED = "mixed"


@dataclass(frozen=True)
class Trial:
    """One threshold, measured on every corpus."""

    threshold: float
    per_corpus: Mapping[str, Measured]

    @property
    def mixed(self) -> Measured:
        """All corpora together, each token counting once; sparsity as the mean over corpora."""
        parts = list(self.per_corpus.values())
        return Measured(
            nll=sum(p.nll for p in parts),
            num_tokens=sum(p.num_tokens for p in parts),
            sparsity=sum(p.sparsity for p in parts) / len(parts),
        )


@dataclass(frozen=True)
class Curve:
    """Every trial by rising threshold, and the chosen one."""

    trials: tuple[Trial, ...]
    chosen: float
    max_ppl_increase_pct: float

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

    The grid is walked upwards until perplexity has risen by three times the budget (and at least 3 %); the interval
    between the last threshold within the budget and the first beyond it is then halved ``refine`` times.

    Args:
        measure: threshold -> one measurement per corpus, on calibration data.
        thresholds: rising, starting with 0.
        max_ppl_increase_pct: the budget, in per cent of the mixture's perplexity over threshold 0.
        refine: bisection steps.
    """
    trials: list[Trial] = []
    for threshold in thresholds:
        trials.append(Trial(threshold, measure(threshold)))
        if increase_pct(trials[-1], trials[0]) > max(3 * max_ppl_increase_pct, 3.0):
            break

    def within(trial: Trial) -> bool:
        return increase_pct(trial, trials[0]) <= max_ppl_increase_pct

    # Perplexity may dip and rise; "largest" means before the first threshold that breaks the budget.
    beyond = next((i for i, t in enumerate(trials) if not within(t)), None)
    if beyond is not None and beyond > 0:
        low, high = trials[beyond - 1].threshold, trials[beyond].threshold
        for _ in range(refine):
            middle = (low + high) / 2
            trial = Trial(middle, measure(middle))
            trials.append(trial)
            low, high = (middle, high) if within(trial) else (low, middle)
        chosen = low
    else:
        chosen = trials[-1].threshold if beyond is None else 0.0
    return Curve(tuple(sorted(trials, key=lambda t: t.threshold)), chosen, max_ppl_increase_pct)
