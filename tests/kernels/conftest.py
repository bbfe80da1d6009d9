from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import cpu


@dataclass(frozen=True)
class Case:
    """A layer and tokens whose gates are cut at a threshold that leaves about the asked share alive."""

    weights: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    threshold: float


def make_case(d_model: int, d_ff: int, dtype: torch.dtype, sparsity: float, tokens: int = 3, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=generator)
    x[:, 0] = 1.0
    w_gate, w_up, w_down_t = (torch.randn(d_ff, d_model, generator=generator) / d_model**0.5 for _ in range(3))
    w_gate[:, 0] += 8.0  # every gate is positive, so any share can be cut by a threshold
    weights = (w_gate.to(dtype), w_up.to(dtype), w_down_t.to(dtype))
    gates = (x.double() @ weights[0].double().T).flatten().sort().values
    below = round(sparsity * gates.numel())
    if below == 0:
        threshold = float(gates[0]) / 2
    elif below == gates.numel():
        threshold = float(gates[-1]) * 2
    else:
        threshold = float(gates[below - 1] + gates[below]) / 2
    return Case(weights, x, threshold)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the plain norm where the truth is zero."""
    scale = float(truth.double().norm())
    return float((found.double() - truth.double()).norm()) / (scale or 1.0)


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def native() -> cpu.NativeLibrary:
    """The native kernels; a machine without a compiler skips, aloud."""
    found = cpu.available()
    if not found:
        pytest.skip(found.why)
    return cpu.load()
