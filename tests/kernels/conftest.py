from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.providers import random_case


@dataclass(frozen=True)
class Case:
    """A layer and tokens whose gates are cut at a threshold that leaves the asked share alive."""

    weights: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    threshold: float


def make_case(d_model: int, d_ff: int, dtype: torch.dtype, sparsity: float, tokens: int = 3, seed: int = 0) -> Case:
    weights, x, threshold = random_case(d_model, d_ff, sparsity, dtype, seed, tokens=tokens)
    return Case(weights.tensors, x, threshold)


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
