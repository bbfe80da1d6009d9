"""Two processes under DDP and FSDP against one process with the penalty in the loss graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from regularized import FACTOR, gradients, relu_model, step_in_the_graph
from two_ranks import run_two

from prosparse_core.recipe_train import L1Reduction

MODES = ["ddp", "ddp-checkpointing", "fsdp", "fsdp-checkpointing"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of the two processes found, by mode; the processes start once for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two("regularized.py", str(folder), *MODES)
    return {mode: [torch.load(folder / f"{mode}-{rank}.pt", weights_only=True) for rank in (0, 1)] for mode in MODES}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(mode: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    whole = relu_model()
    numbers = step_in_the_graph(whole, FACTOR, L1Reduction(d_ff="sum"))
    for found in ranks[mode]:
        assert found["numbers"] == pytest.approx(numbers, rel=2e-6)
        for name, theirs in gradients(whole).items():
            torch.testing.assert_close(found["gradients"][name], theirs, rtol=1e-4, atol=1e-6, msg=name)
