"""Cutoffs for a target recall against trying every score there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core.prediction import cutoff as predictor_cutoff
from prosparse_core.prediction.cutoff import LOWEST, NUM_BINS, WIDTH, active_scores, cutoff_per_layer, global_cutoff
from prosparse_core.prediction.recording import LayerRecording, pack_bits
from prosparse_core.predictor import LayerPredictor, evaluate


def layer(seed: int, share: float = 0.3, num_tokens: int = 200) -> tuple[LayerPredictor, LayerRecording]:
    generator = torch.Generator().manual_seed(seed)
    predictor = LayerPredictor(12, 40, 8, generator)
    with torch.no_grad():
        predictor.fc2.weight *= 8
    x = torch.randn(num_tokens, 12, generator=generator)
    active = torch.rand(num_tokens, 40, generator=generator) < share
    top = active & (torch.rand(num_tokens, 40, generator=generator) < 0.5)
    return predictor, LayerRecording(seed, 40, x, pack_bits(active), pack_bits(top))


@pytest.mark.parametrize("rule", ["nonzero", "top_p"])
@pytest.mark.parametrize("target", [0.3, 0.9, 0.99, 1.0])
def test_the_largest_cutoff_that_finds_enough(target: float, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_cutoff, "EVALUATE_BATCH", 33)
    predictor, seen = layer(1)
    counts = active_scores(predictor, seen, rule)  # type: ignore[arg-type]
    assert int(counts.sum()) == int(seen.active(rule=rule).sum())  # type: ignore[arg-type]
    (cutoff,) = cutoff_per_layer([counts], target)
    with torch.no_grad():
        scores = predictor(seen.inputs)[seen.active(rule=rule)].sort().values  # type: ignore[arg-type]
    # The exact one is the score of which `target` of all are not smaller; ours lies less than a bin below.
    exact = float(scores[len(scores) - math.ceil(target * len(scores) - 1e-9)])
    ours = math.log(cutoff / (1 - cutoff))
    assert exact - WIDTH - 1e-6 <= ours <= exact + 1e-6
    metrics = evaluate(predictor, seen, [cutoff])[0]
    recall = metrics.recall if rule == "nonzero" else metrics.top_recall
    assert recall is not None
    assert recall >= target - 1e-6


def test_one_cutoff_for_all_reaches_the_target_in_the_mean() -> None:
    layers = [layer(i, share) for i, share in enumerate((0.1, 0.3, 0.6))]
    counts = [active_scores(p, r, "nonzero") for p, r in layers]
    cutoff = global_cutoff(counts, 0.9)

    def mean(at: float) -> float:
        found = [evaluate(p, r, [at])[0].recall for p, r in layers]
        return sum(f for f in found if f is not None) / 3

    assert mean(cutoff) >= 0.9
    above = math.log(cutoff / (1 - cutoff)) + 2 * WIDTH
    assert mean(1 / (1 + math.exp(-above))) < 0.9
    per_layer = cutoff_per_layer(counts, 0.9)
    assert min(per_layer) < cutoff < max(per_layer)


def test_layers_without_active_neurons_have_nothing_to_find() -> None:
    empty = torch.zeros(NUM_BINS + 1, dtype=torch.int64)
    predictor, seen = layer(3)
    counts = active_scores(predictor, seen, "nonzero")
    assert cutoff_per_layer([empty, counts], 0.9)[0] == 0.5
    assert global_cutoff([empty, empty], 0.9) == 0.5
    assert global_cutoff([empty, counts], 0.9) == cutoff_per_layer([counts], 0.9)[0]


def test_scores_beyond_the_bins_count_at_their_ends() -> None:
    predictor, seen = layer(4)
    with torch.no_grad():
        predictor.fc2.weight *= 1e4
    counts = active_scores(predictor, seen, "nonzero")
    assert int(counts[0]) > 0
    assert int(counts[-1]) > 0
    assert int(counts.sum()) == int(seen.active().sum())
    (cutoff,) = cutoff_per_layer([counts], 1.0)
    assert cutoff == pytest.approx(1 / (1 + math.exp(-LOWEST))), "the lowest there is, though it does not find all"


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.floats(0.01, 1.0))
def test_a_higher_target_never_raises_the_cutoff(counts: list[int], target: float) -> None:
    histogram = torch.zeros(NUM_BINS + 1, dtype=torch.int64)
    histogram[torch.linspace(1, NUM_BINS, len(counts)).long()] = torch.tensor([*counts[:-1], counts[-1] + 1])
    (low,), (high,) = cutoff_per_layer([histogram], target), cutoff_per_layer([histogram], min(1.0, target * 1.1))
    assert high <= low
