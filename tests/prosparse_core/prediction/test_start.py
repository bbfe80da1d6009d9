"""The low-rank gate against numpy's own truncated SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prosparse_core.prediction.start import svd_predictor

GATE = torch.randn(23, 10, generator=torch.Generator().manual_seed(0))
CHANNELS = torch.rand(10, generator=torch.Generator().manual_seed(1)) + 0.5
X = torch.randn(50, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("hidden", [2, 7, 8, 20, 33])
@pytest.mark.parametrize("channels", [None, CHANNELS])
def test_scores_are_the_best_approximation_of_that_rank(hidden: int, channels: torch.Tensor | None) -> None:
    predictor = svd_predictor(GATE, hidden, channels=channels)
    A = (GATE if channels is None else GATE * channels).double().numpy()
    U, S, Vt = np.linalg.svd(A, full_matrices=False)
    rank = min(hidden // 2, 10)
    expected = X.double().numpy() @ (U[:, :rank] * S[:rank] @ Vt[:rank]).T
    with torch.no_grad():
        assert np.allclose(predictor(X).numpy(), expected, atol=1e-4)
    assert predictor.hidden == hidden


def test_with_room_for_all_of_it_it_is_the_gate_behind_a_norm() -> None:
    predictor = svd_predictor(GATE, 20, channels=CHANNELS)
    normed = X * torch.rsqrt(X.square().mean(-1, keepdim=True)) * CHANNELS
    gate = normed @ GATE.T
    with torch.no_grad():
        agree = (predictor(X) >= 0) == (gate >= 0)
    assert bool(agree[gate.abs() > 1e-4].all())


def test_hidden_numbers_left_over_say_nothing_but_can_learn() -> None:
    predictor = svd_predictor(GATE, 7, generator=torch.Generator().manual_seed(3))
    assert not predictor.fc2.weight[:, 6].any()
    assert bool(predictor.fc1.weight[6].any())
    torch.relu(predictor(X)).sum().backward()
    assert predictor.fc2.weight.grad is not None
    assert bool(predictor.fc2.weight.grad[:, 6].any())
    again = svd_predictor(GATE, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(predictor.fc1.weight, again.fc1.weight)
