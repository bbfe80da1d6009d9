"""Sparse FFNs in a whole model: the same function, refused where it would not be, and a gate that can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu, sparse_ffn
from kernels.sparse_ffn import SparseFFN
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.substitute import use_thresholds
from tasks.timing.sparse_decode import time_decoding, use_sparse_ffns

THRESHOLDS = [0.0, 0.02, 0.05]
PROMPTS = [torch.tensor([[5, 9, 40, 11]]), torch.tensor([[7, 7, 80, 3, 21, 60, 31, 12, 44, 50]])]


@pytest.fixture
def model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=53, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    found = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    use_thresholds(found, THRESHOLDS)
    return found


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that cannot build the kernels."""
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_failure", "native kernels: no C++ compiler on the PATH")
    monkeypatch.setattr(sparse_ffn, "_already_said", set())


@pytest.mark.parametrize("implementation", ["auto", "reference", "dense"])
def test_the_model_computes_the_same(model: Any, implementation: str) -> None:
    token = torch.tensor([[5, 17, 3]])
    with torch.inference_mode():
        expected = model(input_ids=token).logits
        with use_sparse_ffns(model, THRESHOLDS, implementation) as ffns:
            assert ffns.count() == 3
            assert [m.threshold for m in ffns.modules] == THRESHOLDS
            torch.testing.assert_close(model(input_ids=token).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(input_ids=token).logits, expected)


def test_other_thresholds_than_the_model_runs_with_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match="are not those of the model"):
        use_sparse_ffns(model, [0.0, 0.02, 0.06])
    with pytest.raises(BadInput, match="are not those of the model"):
        use_sparse_ffns(model, [0.0, 0.02])


def test_twice_is_refused(model: Any) -> None:
    with use_sparse_ffns(model, THRESHOLDS, "dense"), pytest.raises(BadInput, match="lacks a part"):
        use_sparse_ffns(model, THRESHOLDS, "dense")


@pytest.mark.usefixtures("no_compiler")
def test_an_implementation_this_machine_lacks_leaves_the_model_alone(model: Any) -> None:
    modules = [layer.mlp for layer in model.model.layers]
    with pytest.raises(EnvironmentProblem, match="no C\\+\\+ compiler"):
        use_sparse_ffns(model, THRESHOLDS, "native")
    assert [layer.mlp for layer in model.model.layers] == modules


def decode(model: Any, **changes: Any) -> Any:
    settings = {"num_new": 12, "threads": 1, "budget_s": 0.0, "implementation": "reference", **changes}
    return time_decoding(model, THRESHOLDS, PROMPTS, **settings)


def test_both_sides_are_timed_and_agree(model: Any) -> None:
    done: list[float] = []
    found = decode(model, budget_s=0.6, progress=lambda d, t: done.append(d / t))
    assert found.problem is None
    assert found.timer == "process_cpu"
    assert found.implementation == "reference"
    assert len(found.dense_s) == len(found.sparse_s) >= 12
    assert min(found.dense_s + found.sparse_s) > 0
    assert 0 <= found.rel_err < 1e-4
    assert done == sorted(done)
    assert done[-1] <= 1
    assert not isinstance(model.model.layers[0].mlp, SparseFFN)


def test_the_native_kernels_agree_too(model: Any) -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)
    found = decode(model, implementation="native")
    assert found.problem is None
    assert found.implementation == "native"
    assert 0 < found.rel_err < 1e-4


def test_a_spent_budget_still_gives_some_steps(model: Any) -> None:
    assert len(decode(model).dense_s) == 8
    assert len(decode(model, num_new=5).dense_s) == 5


def test_several_threads_are_timed_by_the_wall(model: Any) -> None:
    assert decode(model, threads=2).timer == "wall"


def breaking(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], after: int = 0) -> None:
    """Let every sparse FFN return ``wrong`` of what it should, once it has been called ``after`` times."""
    right, calls = SparseFFN.forward, [0]

    def forward(self: SparseFFN, x: Tensor) -> Tensor:
        calls[0] += 1
        return wrong(right(self, x)) if calls[0] > after else right(self, x)

    monkeypatch.setattr(SparseFFN, "forward", forward)


def test_other_tokens_fail_the_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda y: -3 * y, after=3 * 4)
    found = decode(model, num_new=40, budget_s=60)
    assert found.problem is not None
    assert "differ" in found.problem
    assert 2 <= len(found.sparse_s) < 40


def test_the_same_tokens_by_other_logits_fail_the_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda y: 1.03 * y)
    found = decode(model)
    assert found.problem is not None
    assert "logits differ" in found.problem or "token" in found.problem
    assert found.rel_err > 1e-3


def test_not_a_number_fails_the_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda y: y * float("nan"))
    assert decode(model).problem is not None


@pytest.mark.usefixtures("no_compiler")
def test_without_kernels_only_the_dense_side_is_timed(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = decode(model, implementation="auto")
    assert found.implementation == "dense"
    assert "no C++ compiler" in found.why
    assert found.sparse_s == []
    assert len(found.dense_s) == 8
    assert found.problem is None
    assert "falls back to dense torch" in caplog.text
