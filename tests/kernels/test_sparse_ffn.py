from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from kernels import reference, sparse_ffn
from kernels.sparse_ffn import MAX_SPARSE_ROWS, SparseFFN

WIDE = torch.float64


def make(case, implementation: str, dtype: torch.dtype = torch.float32, **arguments) -> tuple[SparseFFN, object]:
    made = case(37, 65, dtype, 0.89, tokens=20)
    w_gate, w_up, w_down_t = made.weights
    return SparseFFN(w_gate, w_up, w_down_t.T, made.threshold, implementation, **arguments), made


def truth(made, rows: torch.Tensor) -> torch.Tensor:
    return reference.ffn(rows, *made.weights, made.threshold, accumulate=WIDE)


@pytest.mark.parametrize("rows", [1, 2, MAX_SPARSE_ROWS, MAX_SPARSE_ROWS + 1, 20])
@pytest.mark.parametrize("implementation", ["auto", "native", "certified", "reference", "dense"])
def test_every_implementation_agrees_for_few_rows_and_many(case, error, native, implementation, rows):
    module, made = make(case, implementation)
    assert error(module(made.x[:rows]), truth(made, made.x[:rows])) < 2e-6
    assert module.implementation == ("native" if implementation == "auto" else implementation)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_leading_dimensions_and_odd_layouts(case, error, native, num_threads):
    module, made = make(case, "native", num_threads=num_threads)
    assert module(made.x[0]).shape == (37,)
    assert module(made.x[:6].view(1, 6, 37)).shape == (1, 6, 37)
    assert module(made.x[:0]).shape == (0, 37)
    strided = made.x[::5]
    assert not strided.is_contiguous()
    assert error(module(strided), truth(made, strided)) < 2e-6
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 37\]"):
        module(torch.zeros(2, 36))


def test_only_live_rows_are_read_when_few_and_all_when_many(case, native):
    module, made = make(case, "native")
    s = reference.gate(made.x[:1], module.w_gate, made.threshold)
    module.w_up[s[0] == 0] = torch.nan
    assert bool(module(made.x[:1]).isfinite().all())
    assert bool(module(made.x).isnan().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_input(case, error, native, dtype):
    module, made = make(case, "native")
    for rows in (1, 20):
        x = made.x[:rows].to(dtype)
        y = module(x)
        assert y.dtype == dtype
        assert error(y, truth(made, x)) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_lose_nothing_more(case, error, native, dtype):
    module, made = make(case, "auto", dtype)
    assert module.implementation == "native"
    assert error(module(made.x[:2]), truth(made, made.x[:2])) < 2e-6


def test_a_dtype_the_kernels_do_not_take_falls_back_with_one_warning(case, error, caplog, monkeypatch):
    monkeypatch.setattr(sparse_ffn, "_already_said", set())
    with caplog.at_level(logging.WARNING):
        modules = [make(case, "auto", torch.float64)[0] for _ in range(3)]
    module, made = modules[0], make(case, "dense", torch.float64)[1]
    assert module.implementation == "dense"
    assert "native cannot be used: the weights are torch.float64 on cpu" in module.why
    assert len(caplog.records) == 1
    assert "falls back to dense torch" in caplog.text
    x = made.x[:1].double()
    assert error(module(x), truth(made, x)) < 1e-12
    assert "implementation=dense" in repr(module)


@pytest.mark.parametrize("name", ["native", "certified", "triton"])
def test_an_implementation_asked_for_by_name_never_falls_back(case, name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"implementation '{name}' cannot be used"):
        make(case, name, torch.float64)
    if name == "triton" and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"needs a CUDA device|not installed"):
            make(case, name)


def test_inputs_that_need_a_gradient_take_the_differentiable_path(case, native):
    module, made = make(case, "native")
    x = made.x[:2].clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    with torch.no_grad():
        assert not module(x).requires_grad


def test_a_screened_gate_changes_no_bit(case, native):
    module, made = make(case, "certified")
    plain, _ = make(case, "native")
    for rows in (made.x[:1], made.x[:8]):
        assert torch.equal(module(rows), plain(rows))
    assert "implementation=certified (asked for)" in repr(module)
    wide = torch.zeros(1, 65537)
    with pytest.raises(RuntimeError, match="takes at most 65536"):
        SparseFFN(wide, wide, wide.T, 0.0, "certified")


@pytest.mark.parametrize("implementation", ["native", "certified", "reference", "dense"])
def test_native_weights_lie_together_in_memory_of_their_own(case, native, implementation):
    made = case(37, 65, torch.float32, 0.89)
    w_gate, w_up, w_down_t = made.weights
    module = SparseFFN(w_gate, w_up, w_down_t.T, made.threshold, implementation)
    storages = {w.untyped_storage().data_ptr() for w in (module.w_gate, module.w_up, module.w_down_t)}
    is_native = implementation in ("native", "certified")
    assert (len(storages) == 1) == is_native
    assert (module.w_gate.data_ptr() != w_gate.data_ptr()) == is_native
    if is_native:
        assert (module.w_up.data_ptr() - module.w_gate.data_ptr()) == -(-65 * 37 * 4 // 64) * 64
        w_gate.zero_()
        assert bool(module(made.x[:1]).any()), "the original may go"


@pytest.mark.parametrize("implementation", ["auto", "certified"])
def test_moving_casting_copying_and_editing_keep_it_right(case, error, native, implementation):
    module, made = make(case, implementation)
    expected = truth(made, made.x[:2])
    twin = copy.deepcopy(module)
    module.w_gate.zero_()
    assert module(made.x[:2]).abs().max() == 0, "an edit in place is seen by the kernels"
    assert error(twin(made.x[:2]), expected) < 2e-6, "a copy has weights of its own"
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert half.implementation == module.implementation
    live = reference.kept(made.x[:2].double() @ half.w_gate.double().T, made.threshold)
    weights = (half.w_gate, half.w_up, half.w_down_t)
    assert error(half(made.x[:2]), reference.ffn(made.x[:2], *weights, live=live, accumulate=WIDE)) < 2e-6
    if implementation == "auto":
        assert copy.deepcopy(twin).double().implementation == "dense"


def test_it_replaces_a_linear_gated_ffn_with_relu(error, native):
    torch.manual_seed(0)
    gate, up, down = nn.Linear(48, 96, bias=False), nn.Linear(48, 96, bias=False), nn.Linear(96, 48, bias=False)
    module = SparseFFN(gate.weight, up.weight, down.weight, 0.0)
    x = torch.randn(1, 1, 48)
    with torch.no_grad():
        assert error(module(x), down(torch.relu(gate(x)) * up(x))) < 2e-6
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementation": "fastest"}, "one of auto, native"),
        ({"threshold": -0.5}, "threshold is -0.5"),
        ({"w_down": torch.zeros(4, 3)}, r"expected \[F, D\], \[F, D\], \[D, F\]"),
        ({"w_up": torch.zeros(4, 2)}, r"expected \[F, D\]"),
        ({"w_up": torch.zeros(4, 3).bfloat16()}, "one dtype"),
        ({"num_threads": 0, "implementation": "native"}, "num_threads is 0"),
    ],
)
def test_bad_arguments_are_refused(native, arguments, message):
    good = {"w_gate": torch.zeros(4, 3), "w_up": torch.zeros(4, 3), "w_down": torch.zeros(3, 4), "threshold": 0.0}
    with pytest.raises(ValueError, match=message):
        SparseFFN(**{**good, **arguments})
