from __future__ import annotations

import copy
import itertools
import math
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, cpu, reference
from kernels.certified import CertifiedFFN

SHAPES = [(1, 1), (37, 65), (333, 1001), (576, 1536)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 2e-6  # of the norm; both dtypes: bfloat16 weights are widened exactly, sums are float32
pytestmark = pytest.mark.usefixtures("native")
WIDE = torch.float64


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


def assert_close(found: torch.Tensor, truth: torch.Tensor, magnitude: torch.Tensor, num_terms: int) -> None:
    """Within the worst case of float32 sums: half a unit per term of the sum of the terms' sizes."""
    bound = (num_terms + 10) * 2.0**-24 * magnitude
    excess = (found.double() - truth).abs() - bound
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding explains"  # NaN fails


def check_against_reference(ffn: cpu.NativeFFN, x: torch.Tensor, threshold: float) -> list[tuple[torch.Tensor, ...]]:
    """Compares every kernel on poisoned outputs; returns (found, truth) pairs for a check of the whole norm."""
    tokens, d_model, d_ff = x.shape[0], ffn.d_model, ffn.d_ff
    w_gate, w_up, w_down_t = ffn.weights
    s = ffn.gate(x, threshold, out=poisoned(tokens, d_ff))
    exact = x.double() @ w_gate.double().T
    size = x.double().abs() @ w_gate.double().abs().T
    live = s != 0
    flipped = live != reference.kept(exact, threshold)
    assert bool(((exact - threshold).abs() <= (d_model + 10) * 2.0**-24 * size)[flipped].all()), "a wrong neuron lives"
    s_truth = torch.where(live, exact, torch.zeros_like(exact))
    assert_close(s, s_truth, size, d_model)

    x1 = ffn.s2(s, x, out=poisoned(tokens, d_ff))
    x1_truth = reference.s2(s, x, w_up, accumulate=WIDE)
    up_size = x.double().abs() @ w_up.double().abs().T
    assert_close(x1, x1_truth, s.double().abs() * up_size, d_model)
    assert bool((x1[~live] == 0).all())

    y = ffn.s3(x1, out=poisoned(tokens, d_model))
    y_truth = reference.s3(x1, w_down_t, accumulate=WIDE)
    assert_close(y, y_truth, x1.double().abs() @ w_down_t.double().abs(), d_ff)

    whole = ffn.ffn(x, threshold, out=poisoned(tokens, d_model))
    whole_truth = reference.ffn(x, *ffn.weights, live=live, accumulate=WIDE)
    assert_close(whole, whole_truth, (live * size * up_size) @ w_down_t.double().abs(), 2 * d_model + d_ff)
    assert ffn.num_live == int(live.sum())
    return [(s, s_truth), (x1, x1_truth), (y, y_truth), (whole, whole_truth)]


@pytest.mark.parametrize("skip_dead", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.89, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_agrees_with_the_float64_reference(case, error, shape, dtype, sparsity, num_threads, skip_dead):
    made = case(*shape, dtype, sparsity)
    ffn = cpu.NativeFFN(*made.weights, num_threads, skip_dead=skip_dead)
    for found, truth in check_against_reference(ffn, made.x, made.threshold):
        assert error(found, truth) < TOLERANCE
    share_alive = ffn.num_live / (made.x.shape[0] * ffn.d_ff)
    assert share_alive == pytest.approx(1.0 - sparsity, abs=0.5 / ffn.d_ff + 0.5 * (ffn.d_ff == 1))


@settings(max_examples=60, deadline=None)
@given(
    d_model=st.integers(1, 130),
    d_ff=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.floats(0.0, 1.0),
    num_threads=st.integers(1, 4),
    tokens=st.integers(1, 8),
    skip_dead=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_threads_any_share(case, d_model, d_ff, dtype, sparsity, num_threads, tokens, skip_dead, seed):
    made = case(d_model, d_ff, dtype, sparsity, tokens, seed)
    ffn = cpu.NativeFFN(*made.weights, num_threads, skip_dead=skip_dead)
    check_against_reference(ffn, made.x, made.threshold)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "vector_bits", "needs"),
    [
        ((), 128, set()),
        (("-mavx2", "-mfma"), 256, {"avx2", "fma"}),
        (("-mavx2", "-mfma", "-mf16c", "-mavxvnni"), 256, {"avx2", "fma", "f16c", "avx_vnni"}),
    ],
    ids=["baseline", "avx2", "avx_vnni"],
)
def test_other_instruction_sets_agree_too(case, error, tmp_path, monkeypatch, flags, vector_bits, needs):
    if not needs <= set(build.cpu_identity().split()):
        pytest.skip(f"this CPU does not have all of {needs}")
    path = tmp_path / "other.so"
    failure = build._compile(build.find_compiler(), ("-O0", "-fopenmp", *flags), tmp_path / "temporary.so", path)
    if failure:
        pytest.skip(f"this compiler takes no {flags} with OpenMP: {failure}")
    library = cpu.NativeLibrary(build.Build(path, "other", flags))
    monkeypatch.setattr(cpu, "_library", library)
    assert library.vector_bits == vector_bits
    for shape in SHAPES:
        for dtype in DTYPES:
            made = case(*shape, dtype, 0.7)
            for num_threads, skip_dead in ((1, True), (2, True), (1, False)):
                ffn = cpu.NativeFFN(*made.weights, num_threads, skip_dead=skip_dead)
                for found, truth in check_against_reference(ffn, made.x, made.threshold):
                    assert error(found, truth) < TOLERANCE
            screened, exact = CertifiedFFN(*made.weights), cpu.NativeFFN(*made.weights)
            for x in made.x:
                assert torch.equal(screened.ffn(x, made.threshold), exact.ffn(x, made.threshold))
    check_every_half()


def check_every_half() -> None:
    """Every finite float16 is widened exactly, and every infinity and NaN stays one."""
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    found = cpu.gemv(half, torch.ones(1))
    assert torch.equal(found.nan_to_num(7.0), half[:, 0].float().nan_to_num(7.0))
    assert torch.equal(found.isnan(), half[:, 0].isnan())


def test_every_half_is_widened_exactly():
    check_every_half()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_dead_neurons_are_never_read(case, dtype):
    made = case(333, 1001, dtype, 0.89, tokens=1)
    ffn = cpu.NativeFFN(*made.weights, 2)
    s = ffn.gate(made.x, made.threshold)
    before = ffn.ffn(made.x, made.threshold)
    for weight in made.weights[1:]:
        weight[s[0] == 0] = math.nan
    assert torch.equal(ffn.ffn(made.x, made.threshold), before)
    assert bool(ffn.s3(ffn.s2(s, made.x)).isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_equal_to_the_threshold_lives(dtype):
    w_gate = torch.tensor([[0.5], [0.25], [0.0], [-1.0], [math.nan]]).to(dtype)
    ones = torch.ones(5, 1, dtype=dtype)
    x = torch.ones(1)
    for num_threads in (1, 2):
        ffn = cpu.NativeFFN(w_gate, ones, ones, num_threads)
        assert ffn.gate(x, 0.5).tolist() == [0.5, 0.0, 0.0, 0.0, 0.0]
        assert ffn.gate(x, 0.25).tolist() == [0.5, 0.25, 0.0, 0.0, 0.0]
        assert ffn.ffn(x, 0.25).tolist() == [0.75]
        assert ffn.gate(x, 0.0).tolist() == [0.5, 0.25, 0.0, 0.0, 0.0]  # ReLU: a gate of zero is dead
        assert ffn.ffn(x, 0.6).tolist() == [0.0]
        assert ffn.num_live == 0


@settings(max_examples=40, deadline=None)
@given(
    d_model=st.integers(1, 130),
    d_ff=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.2, 0.5, 0.89, 1.0]),
    tokens=st.integers(1, 10),
    num_threads=st.integers(1, 5),
    skip_dead=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_bit_depends_on_threads_batch_or_dispatch(
    case, d_model, d_ff, dtype, sparsity, tokens, num_threads, skip_dead, seed
):
    made = case(d_model, d_ff, dtype, sparsity, tokens, seed)
    alone = cpu.NativeFFN(*made.weights)
    s, x1, y = [], [], []
    for x in made.x:  # one by one, on one thread
        s.append(alone.gate(x, made.threshold))
        x1.append(alone.s2(s[-1], x))
        y.append(alone.ffn(x, made.threshold))
    ffn = cpu.NativeFFN(*made.weights, num_threads, skip_dead=skip_dead)
    together = ffn.gate(made.x, made.threshold)
    assert torch.equal(together, torch.stack(s))
    assert torch.equal(ffn.s2(together, made.x), torch.stack(x1))
    assert torch.equal(ffn.s3(torch.stack(x1)), torch.stack(y)), "the fused FFN is S2 and S3 in one walk"
    assert torch.equal(ffn.ffn(made.x, made.threshold), torch.stack(y))


def test_results_are_bitwise_repeatable(case):
    made = case(333, 1001, torch.float32, 0.5)
    for num_threads in (1, 2, 3, 40):
        ffn = cpu.NativeFFN(*made.weights, num_threads)
        first = ffn.ffn(made.x, made.threshold)
        assert all(torch.equal(ffn.ffn(made.x, made.threshold), first) for _ in range(5))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemv(case, error, shape, dtype, num_threads):
    made = case(*shape, dtype, 0.5)
    x = made.x[0].contiguous()
    out = cpu.gemv(made.weights[1], x, poisoned(shape[1]), num_threads=num_threads)
    assert error(out, made.weights[1].double() @ x.double()) < TOLERANCE


def test_one_token_keeps_its_single_dimension(case):
    made = case(37, 65, torch.float32, 0.5)
    ffn = cpu.NativeFFN(*made.weights)
    assert ffn.ffn(made.x[0], made.threshold).shape == (37,)
    assert ffn.gate(made.x[0]).shape == (65,)
    assert torch.equal(ffn.ffn(made.x, made.threshold)[0], ffn.ffn(made.x[0], made.threshold))


def test_copies_and_pickles_own_their_weights(case):
    made = case(37, 65, torch.float32, 0.5)
    ffn = cpu.NativeFFN(*made.weights, 2, skip_dead=False)
    before = ffn.ffn(made.x, made.threshold)
    for twin in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn))):
        assert twin.weights[0].data_ptr() != ffn.weights[0].data_ptr()
        assert (twin.num_threads, twin.skip_dead) == (2, False)
        assert torch.equal(twin.ffn(made.x, made.threshold), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_are_equal_contiguous_apart_and_aligned(case, dtype):
    made = case(333, 1001, dtype, 0.5)
    packed = cpu.pack([*made.weights, torch.arange(3.0), made.weights[0].T])
    for found, given_ in zip(packed, (*made.weights, torch.arange(3.0), made.weights[0].T), strict=True):
        assert torch.equal(found, given_)
        assert found.dtype == given_.dtype
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in packed)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    expected = cpu.NativeFFN(*made.weights).ffn(made.x, made.threshold)
    assert torch.equal(cpu.NativeFFN(*packed[:3]).ffn(made.x, made.threshold), expected)
    assert cpu.pack([]) == []


def good() -> list[torch.Tensor]:
    return [torch.zeros(4, 3) for _ in range(3)]


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(3, 4).T, "w_gate is not contiguous"),
        (1, torch.zeros(3, 4).T, "w_up is not contiguous"),
        (2, torch.zeros(3, 4), r"w_down_t has shape \(3, 4\)"),
        (1, torch.zeros(4, 3, dtype=torch.bfloat16), "all three must be the same"),
        (0, torch.zeros(4, 3, dtype=torch.float64), "w_gate is torch.float64"),
        (0, torch.zeros(4, 3, device="meta"), "on meta"),
        (0, torch.zeros(12), "has shape"),
        (0, torch.zeros(0, 3), "has shape"),
    ],
)
def test_wrong_weights_are_refused(index, wrong, message):
    weights = good()
    weights[index] = wrong
    with pytest.raises(ValueError, match=message):
        cpu.NativeFFN(*weights)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4),
        torch.zeros(2, 4),
        torch.zeros(3, 2).T,
        torch.zeros(6)[::2],
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(1, 1, 3),
        torch.zeros(()),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}",
)
def test_wrong_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"x is torch\..*expected contiguous float32 \[3\]"):
        cpu.NativeFFN(*good()).ffn(x)


def test_wrong_outputs_are_refused():
    ffn = cpu.NativeFFN(*good())
    for out in (torch.zeros(4), torch.zeros(2, 3), torch.zeros(3).double(), torch.zeros(6)[::2]):
        with pytest.raises(ValueError, match="out is"):
            ffn.ffn(torch.zeros(3), out=out)
    with pytest.raises(ValueError, match="s is"):
        ffn.s2(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="x1 is"):
        ffn.s3(torch.zeros(3))


@pytest.mark.parametrize("num_threads", [0, -1, 257])
def test_an_impossible_number_of_threads_is_refused(num_threads):
    with pytest.raises(ValueError, match="num_threads"):
        cpu.NativeFFN(*good(), num_threads)


def test_an_output_over_an_input_is_refused():
    ffn, memory = cpu.NativeFFN(*good()), torch.zeros(12)
    with pytest.raises(ValueError, match="shares memory"):
        ffn.ffn(memory[:3], out=memory[:3])
    with pytest.raises(ValueError, match="shares memory"):
        ffn.gate(memory[:3], out=memory[2:6])
    with pytest.raises(ValueError, match="shares memory"):
        ffn.s2(memory[4:8], memory[:3], out=memory[7:11])
    assert ffn.gate(memory[:3], out=memory[3:7]).shape == (4,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_refused_and_leaves_the_output_alone(bad):
    x, out = torch.ones(3, 3), torch.full((3, 3), 7.0)
    x[2, 1] = bad
    ffn = cpu.NativeFFN(*good())
    for call in (lambda: ffn.ffn(x, out=out), lambda: ffn.gate(x), lambda: ffn.s2(torch.ones(3, 4), x)):
        with pytest.raises(ValueError, match=rf"x holds {bad} at \[2, 1\]"):
            call()
    assert bool((out == 7.0).all())


def test_no_tokens_give_no_results():
    ffn = cpu.NativeFFN(*good())
    assert ffn.ffn(torch.zeros(0, 3)).shape == (0, 3)
    assert ffn.num_live == 0
    assert ffn.s3(ffn.s2(ffn.gate(torch.zeros(0, 3)), torch.zeros(0, 3))).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_costs_a_few_microseconds(dtype):
    """Besides the work: the smallest layer there is, an output given."""
    ffn = cpu.NativeFFN(*(torch.zeros(1, 1, dtype=dtype) for _ in range(3)))
    x, out = torch.zeros(1), torch.zeros(1)
    best_us = min(_call_us(ffn, x, out) for _ in range(20))
    assert best_us < 20, "5 us on a quiet machine"


def _call_us(ffn: cpu.NativeFFN, x: torch.Tensor, out: torch.Tensor) -> float:
    start = time.process_time_ns()
    for _ in range(100):
        ffn.ffn(x, 0.0, out)
    return (time.process_time_ns() - start) / 1e5


def test_a_bad_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        cpu.NativeFFN(*good()).ffn(torch.zeros(3), -1.0)
