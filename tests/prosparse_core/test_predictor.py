"""The predictor's numbers against counting by hand, and its training against what can be learnt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from prosparse_core import predictor as predictors
from prosparse_core.errors import BadInput
from prosparse_core.prediction.recording import LayerRecording, pack_bits
from prosparse_core.predictor import LayerPredictor, evaluate, train, weighted_bce

SETTINGS = {"hidden": 32, "epochs": 12, "batch_size": 64, "lr": 5e-3, "seed": 3}


def recording(num_tokens: int, *, scale: float = 1.0, seed: int = 0, layer: int = 0) -> LayerRecording:
    """37 neurons, each active where a fixed linear gate of 20 inputs exceeds its own threshold; about 80 % are not."""
    gate = torch.randn(37, 20, generator=torch.Generator().manual_seed(99))
    x = torch.randn(num_tokens, 20, generator=torch.Generator().manual_seed(seed))
    return LayerRecording(layer, 37, (scale * x).bfloat16(), pack_bits(x @ gate.T > 4.0))


def constant(rows: list[list[float]]) -> LayerPredictor:
    """A predictor whose logits for the i-th unit vector are ``rows[i]``."""
    predictor = LayerPredictor(len(rows), len(rows[0]), len(rows))
    with torch.no_grad():
        predictor.fc1.weight.copy_(torch.eye(len(rows)))
        predictor.fc2.weight.copy_(torch.tensor(rows).T)
    return predictor


def test_golden_metrics() -> None:
    active = torch.tensor([[True, True, False], [False, True, False]])
    seen = LayerRecording(0, 3, torch.eye(2), pack_bits(active))
    # logits 0 is probability 0.5, 2 is 0.881, -2 is 0.119
    low, half, high = evaluate(constant([[2.0, -2.0, 0.0], [0.0, 2.0, -2.0]]), seen, [0.1, 0.5, 0.75])
    assert (low.recall, low.predicted_sparsity, low.true_sparsity) == (1.0, 0.0, 0.5)
    assert half.recall == pytest.approx(2 / 3)
    assert half.predicted_sparsity == pytest.approx(2 / 6), "a probability equal to the cutoff counts as active"
    assert high.recall == pytest.approx(2 / 3)
    assert high.predicted_sparsity == pytest.approx(4 / 6)
    assert {m.num_tokens for m in (low, half, high)} == {2}


def test_recall_is_the_ratio_of_sums_over_tokens_not_a_mean_of_ratios() -> None:
    active = torch.tensor([[True, True, True, True], [True, False, False, False]])
    seen = LayerRecording(0, 4, torch.eye(2), pack_bits(active))
    (metrics,) = evaluate(constant([[1.0, 1.0, 1.0, 1.0], [-1.0] * 4]), seen, [0.5])
    assert metrics.recall == pytest.approx(4 / 5)


def test_metrics_equal_a_count_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictors, "EVALUATE_BATCH", 7)
    seen, predictor = recording(45), LayerPredictor(20, 37, 5)
    probability = torch.sigmoid(predictor(seen.inputs.float())).tolist()
    active = seen.active().tolist()
    for metrics in evaluate(predictor, seen, [0.3, 0.5, 0.6]):
        hits = truth = positive = 0
        for t in range(45):
            for n in range(37):
                hits += active[t][n] and probability[t][n] >= metrics.cutoff
                truth += active[t][n]
                positive += probability[t][n] >= metrics.cutoff
        assert metrics.recall == hits / truth
        assert metrics.predicted_sparsity == pytest.approx(1 - positive / (45 * 37), abs=1e-12)
        assert metrics.true_sparsity == pytest.approx(1 - truth / (45 * 37), abs=1e-12)


def test_without_active_neurons_there_is_no_recall() -> None:
    seen = LayerRecording(0, 9, torch.ones(4, 3), pack_bits(torch.zeros(4, 9, dtype=torch.bool)))
    (metrics,) = evaluate(LayerPredictor(3, 9, 2), seen, [0.5])
    assert metrics.recall is None
    assert metrics.true_sparsity == 1.0


def test_the_loss_by_hand() -> None:
    logits, active = torch.tensor([[0.3, -1.2]]), torch.tensor([[1.0, 0.0]])
    on, off = -math.log(1 / (1 + math.exp(-0.3))), -math.log(1 - 1 / (1 + math.exp(1.2)))
    assert float(weighted_bce(logits, active, 0.1)) == pytest.approx((on + 0.1 * off) / 2, rel=1e-6)


def test_training_finds_what_is_there() -> None:
    losses: list[float] = []
    predictor = train(recording(4096), **SETTINGS, on_epoch=lambda epoch, loss: losses.append(loss))
    unseen = recording(1000, seed=1)
    (metrics,) = evaluate(predictor, unseen, [0.5])
    assert 0.75 < metrics.true_sparsity < 0.9
    assert metrics.recall is not None
    assert metrics.recall > 0.9
    assert metrics.predicted_sparsity > 0.6
    assert len(losses) == SETTINGS["epochs"]
    assert losses[-1] < 0.5 * losses[0]
    assert predictor.fc1.bias is None
    assert predictor.fc2.bias is None


def test_the_seed_decides_and_nothing_else() -> None:
    settings = {**SETTINGS, "epochs": 2}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = train(recording(300), **settings)
    assert torch.equal(torch.rand(2), expected), "the global random state is left alone"
    again = train(recording(300), **settings)
    for name in ("fc1", "fc2"):
        assert torch.equal(getattr(first, name).weight, getattr(again, name).weight)
    assert not torch.equal(first.fc1.weight, train(recording(300), **{**settings, "seed": 4}).fc1.weight)
    assert not torch.equal(first.fc1.weight, train(recording(300, layer=1), **settings).fc1.weight)


def test_the_size_of_x_does_not_matter_to_training() -> None:
    # Powers of two: scaling them is exact, so even the rounding is the same.
    small, large = (train(recording(300, scale=s), **{**SETTINGS, "epochs": 3}) for s in (2.0**-6, 8.0))
    assert torch.equal(small.fc2.weight, large.fc2.weight)
    assert torch.allclose(small.fc1.weight * 2.0**-9, large.fc1.weight, rtol=1e-6)


def test_at_one_half_only_the_direction_of_x_counts_and_a_norm_folds_into_fc1() -> None:
    predictor, x = LayerPredictor(20, 37, 16), torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    norm = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.5
    size = x.square().mean(-1, keepdim=True).sqrt()
    folded = LayerPredictor(20, 37, 16)
    folded.load_state_dict(predictor.state_dict())
    with torch.no_grad():
        folded.fc1.weight *= norm
        logits, before = predictor(norm * x / size), folded(x)
    sure = logits.abs() > 1e-4
    assert torch.equal((logits >= 0)[sure], (before >= 0)[sure])


def test_recall_of_the_largest_beside_that_of_all() -> None:
    active = torch.tensor([[True, True, True, False], [True, True, False, False]])
    largest = torch.tensor([[True, False, False, False], [False, True, False, False]])
    seen = LayerRecording(0, 4, torch.eye(2), pack_bits(active), pack_bits(largest))
    (metrics,) = evaluate(constant([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0]]), seen, [0.5])
    assert (metrics.recall, metrics.top_recall) == (3 / 5, 1 / 2)
    assert (metrics.true_sparsity, metrics.top_sparsity) == (3 / 8, 6 / 8)
    (without,) = evaluate(
        constant([[1.0] * 4, [1.0] * 4]), LayerRecording(0, 4, torch.eye(2), pack_bits(active)), [0.5]
    )
    assert (without.top_recall, without.top_sparsity) == (None, None)


def test_labels_and_the_weight_of_the_inactive_decide_what_is_learnt() -> None:
    """Five neurons, of which the first two alone count as largest: what is learnt as inactive is predicted so."""
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    active = (x[:, :5] > 0) | (torch.arange(5) < 2)
    seen = LayerRecording(0, 5, x, pack_bits(active), pack_bits(active & (torch.arange(5) < 2)))
    settings = {"hidden": 16, "epochs": 20, "batch_size": 100, "lr": 1e-2, "seed": 0}
    (both,) = evaluate(train(seen, **settings), seen, [0.5])
    (top,) = evaluate(train(seen, **settings, labels="top_p"), seen, [0.5])
    assert both.recall is not None
    assert top.recall is not None
    assert both.recall > 0.95 > 0.85 > top.recall
    assert top.top_recall == pytest.approx(1.0, abs=0.02)
    weights = [evaluate(train(seen, **settings, negative_weight=w), seen, [0.5])[0] for w in (0.01, 1.0, 100.0)]
    shares = [m.predicted_sparsity for m in weights]
    assert shares == sorted(shares)
    assert shares[0] < shares[2] - 0.1


def test_a_start_is_kept_up_to_one_factor() -> None:
    start = LayerPredictor(20, 37, 32, torch.Generator().manual_seed(5))
    seen = recording(300, scale=4.0)
    kept = train(seen, **{**SETTINGS, "epochs": 0}, start=start)
    x = seen.inputs.float()
    with torch.no_grad():
        before, after = start(x), kept(x)
    assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-6)
    assert float(after.square().mean().sqrt()) == pytest.approx(predictors.START_LOGITS, rel=1e-3)


def test_a_layer_that_only_sees_zeros_trains() -> None:
    seen = LayerRecording(0, 9, torch.zeros(10, 4), pack_bits(torch.zeros(10, 9, dtype=torch.bool)))
    predictor = train(seen, hidden=3, epochs=1, batch_size=4, lr=1e-3, seed=0)
    assert bool(torch.isfinite(predictor.fc1.weight).all())


def test_files_come_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    predictor = LayerPredictor(6, 11, 4)
    predictors.save(predictor, tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["layer_3.safetensors"]
    again = predictors.load(tmp_path, 3)
    assert torch.equal(again.fc2.weight, predictor.fc2.weight)
    assert again.hidden == 4
    with pytest.raises(BadInput, match=r"layer_0.safetensors is no activation predictor"):
        predictors.load(tmp_path, 0)
    whole = predictors.layer_file(tmp_path, 3).read_bytes()
    predictors.layer_file(tmp_path, 3).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="is no activation predictor"):
        predictors.load(tmp_path, 3)
