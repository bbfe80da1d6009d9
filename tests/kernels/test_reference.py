from __future__ import annotations

import math

import pytest
import torch

from kernels import reference

X = torch.tensor([1.0, 2.0])
W_GATE = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.5, 0.0], [0.0, 0.25]])  # gates 3, -1, 0.5, 0.5
W_UP = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])  # ups 1, 3, 2, 2
W_DOWN_T = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0], [1.0, 1.0]])


def test_golden_numbers_by_hand():
    s = reference.gate(X, W_GATE)
    assert s.tolist() == [3.0, 0.0, 0.5, 0.5]
    x1 = reference.s2(s, X, W_UP)
    assert x1.tolist() == [3.0, 0.0, 1.0, 1.0]
    assert reference.s3(x1, W_DOWN_T).tolist() == [4.0, 2.0]
    assert reference.ffn(X, W_GATE, W_UP, W_DOWN_T).tolist() == [4.0, 2.0]


def test_a_gate_equal_to_the_threshold_is_kept_but_a_gate_of_zero_is_dead_under_relu():
    assert reference.gate(X, W_GATE, 0.5).tolist() == [3.0, 0.0, 0.5, 0.5]
    assert reference.gate(X, W_GATE, math.nextafter(0.5, 1.0)).tolist() == [3.0, 0.0, 0.5, 0.5]  # rounds to 0.5f
    assert reference.gate(X, W_GATE, 0.5001).tolist() == [3.0, 0.0, 0.0, 0.0]
    assert reference.kept(torch.tensor([0.0, -0.0, 1e-45]), 0.0).tolist() == [False, False, True]


def test_a_gate_that_is_not_a_number_is_dead():
    assert reference.kept(torch.tensor([math.nan, math.inf]), 0.0).tolist() == [False, True]
    assert reference.kept(torch.tensor([math.nan, math.inf]), 0.1).tolist() == [False, True]


def test_dead_neurons_are_exactly_zero_even_where_up_overflows():
    up = W_UP.clone()
    up[1] = math.inf
    assert reference.s2(reference.gate(X, W_GATE), X, up)[1] == 0.0


def test_a_given_live_set_replaces_the_threshold():
    live = torch.tensor([False, True, False, False])
    assert reference.ffn(X, W_GATE, W_UP, W_DOWN_T, 0.5, live=live).tolist() == [-27.0, -27.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_is_computed_in_float32_or_float64(dtype):
    weights = [w.to(dtype) for w in (W_GATE, W_UP, W_DOWN_T)]
    assert reference.ffn(X.to(dtype), *weights).dtype == torch.float32
    wide = reference.ffn(X.to(dtype), *weights, accumulate=torch.float64)
    assert wide.dtype == torch.float64
    assert wide.tolist() == [4.0, 2.0]


def test_leading_dimensions_are_kept():
    batch = X.expand(2, 5, 2)
    assert reference.ffn(batch, W_GATE, W_UP, W_DOWN_T).shape == (2, 5, 2)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, -math.inf])
def test_a_threshold_without_a_meaning_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold is"):
        reference.gate(X, W_GATE, threshold)
