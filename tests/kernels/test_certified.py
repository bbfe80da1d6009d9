from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import certified, cpu
from kernels.certified import CertifiedFFN, quantise, upper_bounds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("native")


def gaussian(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=generator) / cols**0.5


def one_outlier(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    weight = gaussian(generator, rows, cols)
    weight[torch.arange(rows), torch.randint(cols, (rows,), generator=generator)] *= 1e4
    return weight


def all_sizes(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """From below the smallest denormal to above the largest float32; some rows hold an infinity."""
    weight = torch.randn(rows, cols, generator=generator).double()
    return (weight * 10.0 ** (torch.rand(rows, 1, generator=generator) * 90 - 48)).float()


def denormal(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=generator) * 1e-41


def largest(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.finfo(torch.float32).max * torch.randn(rows, cols, generator=generator).sign()


def equal_entries(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """Ties everywhere, and every entry at the end of the 8-bit range."""
    return (torch.randint(-3, 4, (rows, 1), generator=generator) / 8.0).expand(rows, cols).contiguous()


def half_steps(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """Every entry is half a step off the 8-bit grid: the worst residual there is."""
    weight = torch.randint(-126, 126, (rows, cols), generator=generator) + 0.5
    weight[:, 0] = 127.0
    return weight


def zeros(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.zeros(rows, cols)


def not_numbers(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    weight = gaussian(generator, rows, cols)
    weight[::3, 0] = math.nan
    weight[1::3, -1] = math.inf
    return weight


WEIGHTS = [gaussian, one_outlier, all_sizes, denormal, largest, equal_entries, half_steps, zeros, not_numbers]


def normal(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    return torch.randn(w_gate.shape[1], generator=generator)


def no_input(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    return torch.zeros(w_gate.shape[1])


def one_huge(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    x = normal(generator, w_gate)
    x[torch.randint(x.numel(), (1,), generator=generator)] = 3e4
    return x


def any_size(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    exponent = torch.rand(1, generator=generator) * 80 - 45
    return (normal(generator, w_gate).double() * 10.0**exponent).float().clamp(-3e38, 3e38)


def same_sign(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    """Equal sizes and signs: rounding errors add up instead of cancelling."""
    return torch.full(w_gate.shape[1:], 1 / 3.0)


def residual(generator: torch.Generator, w_gate: torch.Tensor) -> torch.Tensor:
    """Along what the 8-bit grid leaves of one row: there Cauchy and Schwarz leave nothing to spare."""
    screen = quantise(w_gate)
    near = screen.rows.double() * screen.scale.double()[:, None]
    row = int(torch.randint(w_gate.shape[0], (1,), generator=generator))
    x = (w_gate.double() - near)[row].float().nan_to_num(0, 0, 0)
    return x / x.abs().max().clamp(min=1e-30)


INPUTS = [normal, one_huge, any_size, same_sign, residual, no_input]


def tempting_threshold(gates: torch.Tensor, choice: int) -> float:
    """Zero, or a gate itself, or its neighbour on either side: where one rounding decides."""
    positive = gates[(gates > 0) & gates.isfinite()].sort().values
    if choice == 0 or positive.numel() == 0:
        return 0.0
    value = positive[(choice * 7919) % positive.numel()]
    towards = (value, torch.tensor(math.inf), torch.tensor(0.0))[choice % 3]
    return float(torch.nextafter(value, towards).clamp(max=torch.finfo(torch.float32).max))


def assert_equal_to_exact(w_gate: torch.Tensor, x: torch.Tensor, threshold: float, num_threads: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = (gaussian(generator, *w_gate.shape).to(w_gate.dtype) for _ in range(2))
    exact, screened = (kind(w_gate, up, down, num_threads) for kind in (cpu.NativeFFN, CertifiedFFN))
    poison = torch.full((w_gate.shape[0],), math.nan)
    assert torch.equal(screened.gate(x, threshold, out=poison), exact.gate(x, threshold))
    y, truth = screened.ffn(x, threshold, out=torch.full_like(x, math.nan)), exact.ffn(x, threshold)
    assert torch.equal(y.nan_to_num(), truth.nan_to_num())  # infinite gates give what they give
    assert torch.equal(y.isnan(), truth.isnan())
    assert screened.num_live == exact.num_live
    assert screened.num_live <= screened.num_exact <= w_gate.shape[0]


@settings(max_examples=250, deadline=None)
@given(
    make=st.sampled_from(WEIGHTS),
    make_x=st.sampled_from(INPUTS),
    d_model=st.integers(1, 400),
    d_ff=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    choice=st.integers(0, 60),
    num_threads=st.integers(1, 3),
    flush=st.booleans(),
    seed=st.integers(0, 10_000),
)
@example(half_steps, normal, 64, 256, torch.float32, 3, 1, False, 0)
@example(gaussian, residual, 64, 256, torch.float32, 3, 1, False, 0)
@example(denormal, any_size, 33, 100, torch.float32, 0, 1, True, 1)
def test_no_live_neuron_is_missed(make, make_x, d_model, d_ff, dtype, choice, num_threads, flush, seed):
    generator = torch.Generator().manual_seed(seed)
    w_gate = make(generator, d_ff, d_model).to(dtype)
    x = make_x(generator, w_gate)
    try:
        torch.set_flush_denormal(flush)
        gates = cpu.gemv(w_gate, x)
        threshold = tempting_threshold(gates, choice)
        bounds = upper_bounds(quantise(w_gate), x)
        assert not bool((gates.double() > bounds).any()), "a gate lies above its bound"
        assert_equal_to_exact(w_gate, x, threshold, num_threads)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("d_model", [1, 64, 65, 129, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_lets_through_what_the_readable_twin_lets_through(dtype, d_model):
    generator = torch.Generator().manual_seed(d_model)
    for make in (gaussian, one_outlier, half_steps, equal_entries):
        w_gate = make(generator, 200, d_model).to(dtype)
        x = torch.randn(d_model, generator=generator)
        ffn = CertifiedFFN(w_gate, w_gate, w_gate)
        gates = cpu.gemv(w_gate, x)
        threshold = float(gates.sort().values[178].clamp(min=0))
        ffn.gate(x, threshold)
        bounds = upper_bounds(ffn.screen, x)
        skipped = bounds < threshold if threshold > 0 else bounds <= 0
        assert ffn.num_exact == int((~skipped).sum())


def test_most_rows_are_skipped_and_never_read():
    generator = torch.Generator().manual_seed(0)
    weights = [gaussian(generator, 1536, 576) for _ in range(3)]
    x = torch.randn(576, generator=generator)
    gates = cpu.gemv(weights[0], x)
    threshold = float(gates.quantile(0.89))
    ffn = CertifiedFFN(*weights)
    before = ffn.ffn(x, threshold)
    assert ffn.num_live == pytest.approx(0.11 * 1536, abs=1)
    assert ffn.num_live < ffn.num_exact < 0.2 * 1536
    skipped = upper_bounds(ffn.screen, x) < threshold
    with torch.no_grad():
        weights[0].data[skipped] = math.nan  # .data: behind the back of the version that would screen anew
    assert torch.equal(ffn.ffn(x, threshold), before)


def test_the_bound_holds_against_float64_and_is_not_far_off():
    generator = torch.Generator().manual_seed(0)
    w_gate, x = gaussian(generator, 500, 1024), torch.randn(1024, generator=generator)
    screen = quantise(w_gate)
    slack = upper_bounds(screen, x) - w_gate.double() @ x.double()
    assert float(slack.min()) > 0
    assert float(slack.mean()) < 0.4, "of gates with a standard deviation of 1"
    near = screen.rows.double() * screen.scale.double()[:, None]
    assert bool(((w_gate.double() - near).norm(dim=1) < screen.spread.double()).all())
    assert bool((near.norm(dim=1) < screen.norm.double()).all())
    assert torch.equal(screen.total, screen.rows.sum(1, dtype=torch.int32))
    assert screen.packed_bounds().shape == (500, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_screen_that_lets_most_through_is_given_up(dtype):
    generator = torch.Generator().manual_seed(0)
    w_gate = gaussian(generator, 2000, 64).abs().to(dtype)
    x = torch.randn(64, generator=generator).abs()
    x[0] = 0.0
    w_gate[256:, 1:] *= -1  # dead, but after a first block of survivors nobody asks the screen
    ffn = CertifiedFFN(w_gate, w_gate, w_gate)
    ffn.ffn(x, 0.0)
    assert ffn.num_live == 256
    assert ffn.num_exact == 2000
    assert_equal_to_exact(w_gate, x, 0.0)


def test_an_edit_in_place_is_screened_anew():
    generator = torch.Generator().manual_seed(0)
    weights = [gaussian(generator, 100, 64) for _ in range(3)]
    x = torch.randn(64, generator=generator)
    ffn = CertifiedFFN(*weights)
    threshold = float(ffn.gate(x).quantile(0.95))
    ffn.ffn(x, threshold)
    weights[0].copy_(weights[0].flip(0) * 3)
    assert torch.equal(ffn.ffn(x, threshold), cpu.NativeFFN(*weights).ffn(x, threshold))
    assert ffn.num_exact < 100


def test_weights_of_inference_mode_copies_and_pickles(case):
    made = case(37, 65, torch.float32, 0.9)
    expected = cpu.NativeFFN(*made.weights).ffn(made.x[0], made.threshold)
    with torch.inference_mode():
        inner = CertifiedFFN(*(w.clone() for w in made.weights))
        assert torch.equal(inner.ffn(made.x[0], made.threshold), expected)
    ffn = CertifiedFFN(*made.weights, 2)
    for twin in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn))):
        assert isinstance(twin, CertifiedFFN)
        assert twin.num_threads == 2
        assert torch.equal(twin.ffn(made.x[0], made.threshold), expected)


def test_several_tokens_are_exact_too(case):
    made = case(37, 65, torch.bfloat16, 0.9, tokens=9)
    exact, screened = (kind(*made.weights) for kind in (cpu.NativeFFN, CertifiedFFN))
    for tokens in (2, 8, 9):
        x = made.x[:tokens]
        assert torch.equal(screened.ffn(x, made.threshold), exact.ffn(x, made.threshold))
        assert torch.equal(screened.gate(x, made.threshold), exact.gate(x, made.threshold))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_refused(bad):
    w = torch.ones(4, 3)
    x = torch.tensor([1.0, bad, 2.0])
    for kind in (cpu.NativeFFN, CertifiedFFN):
        ffn = kind(w, w, w)
        for call in (ffn.gate, ffn.ffn):
            with pytest.raises(ValueError, match=rf"x holds {bad} at \[1\]"):
                call(x)


def test_a_width_beyond_the_integers_is_refused():
    wide = torch.zeros(1, certified.MAX_D_MODEL + 1)
    with pytest.raises(ValueError, match="at most 65536"):
        CertifiedFFN(wide, wide, wide)
    assert_equal_to_exact(torch.ones(2, certified.MAX_D_MODEL), torch.ones(certified.MAX_D_MODEL), 65536.0)
    assert_equal_to_exact(-torch.ones(2, certified.MAX_D_MODEL), torch.ones(certified.MAX_D_MODEL), 0.0)
