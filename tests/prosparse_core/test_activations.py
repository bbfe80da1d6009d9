"""Activations against their formulas, the boundary included."""

from __future__ import annotations

import pytest
import torch

from prosparse_core.activations import FATReLU, ReLU, ShiftedReLU

X = torch.tensor([-1.0, -0.01, 0.0, 0.0099, 0.01, 0.5])


def test_relu() -> None:
    assert ReLU()(X).tolist() == torch.tensor([0.0, 0.0, 0.0, 0.0099, 0.01, 0.5]).tolist()


def test_shifted_relu() -> None:
    assert torch.equal(ShiftedReLU(0.1)(X), torch.clamp(X - 0.1, min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fatrelu_keeps_its_boundary_and_the_value_itself(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    threshold = float(x[4])  # representable in this dtype: the boundary is met exactly
    assert torch.equal(FATReLU(threshold)(x), torch.where(x >= threshold, x, torch.zeros_like(x)))
    assert FATReLU(threshold)(x)[4] == x[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [1e-30, 0.0077, 0.01, 0.1, 1 / 3])
def test_fatrelu_is_the_comparison_it_stands_for(dtype: torch.dtype, threshold: float) -> None:
    near = torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    x = torch.cat([near * (1 + torch.arange(-3, 4) * torch.finfo(dtype).eps), torch.linspace(-1, 1, 999)]).to(dtype)
    x.requires_grad_()
    found = FATReLU(threshold)(x)
    assert torch.equal(found, torch.where(x >= threshold, x, torch.zeros_like(x)))
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x >= threshold).to(dtype))


def test_fatrelu_at_zero_is_relu() -> None:
    assert torch.equal(FATReLU(0.0)(X), ReLU()(X))


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        FATReLU(-0.1)
