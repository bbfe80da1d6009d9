from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch

from kernels import bench, cpu, measure, providers
from kernels.bench import FFNWeights, bench_layers, random_case
from kernels.certified import CertifiedFFN

D, F = 64, 96


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """A sweep of a real cache takes milliseconds; what the rows hold does not depend on it."""
    for module in (bench, measure):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 64 << 10)


def run(dtype=torch.float32, sparsity=0.75, layers=2, **options):
    made = [random_case(D, F, sparsity, dtype, seed, tokens=6) for seed in range(layers)]
    arguments = {"mask_source": "random", "repeats": 4, **options}
    return bench_layers([m[0] for m in made], [m[1] for m in made], [m[2] for m in made], **arguments)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_and_provider_has_a_row_that_passed_the_gate(native, dtype, threads):
    rows = run(dtype, threads=threads)
    usual = [(k, p) for k in bench.KERNELS for p in ("torch", "native_dense", "native")]
    assert {(row.kernel, row.provider) for row in rows} == {*usual, ("gate", "certified"), ("ffn", "certified")}
    assert len(rows) == 14
    for row in rows:
        assert row.gate_passed
        rounded = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5) if row.provider == "torch" else 1e-5
        assert 0 <= row.rel_err < rounded
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.num_reps == 4
        assert (row.d_model, row.d_ff, row.num_tokens, row.threads) == (D, F, 1, threads)
        assert (row.dtype, row.mask_source) == (str(dtype).removeprefix("torch."), "random")
        assert row.timer == ("process_cpu" if threads == 1 else "wall")
        assert row.sparsity == pytest.approx(0.75, abs=0.01)
        assert (row.byte_ratio is None) == (row.provider in ("torch", "native_dense"))
        assert row.weights_bytes > row.cache_bytes == 64 << 10


def test_bytes_say_nothing_of_weights_that_the_cache_holds(native, monkeypatch):
    for module in (bench, measure):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 32 << 20)
    monkeypatch.setattr(measure, "MAX_SWEEP_BYTES", 1 << 20)
    for row in run(layers=1):
        assert row.byte_ratio is None
        assert row.weights_bytes == bench.MAX_COPIES * 3 * 4 * D * F < row.cache_bytes == 32 << 20
        said = "n/a: the weights, 4.5 MiB, fit into the last-level cache of 32 MiB"
        assert row.byte_ratio_note == (None if row.provider in ("torch", "native_dense") else said)


def test_memory_is_read_between_the_rounds(native):
    probes = []

    class Ceiling:
        probe = staticmethod(lambda: probes.append(1))

    rows = run(layers=1, ceiling=Ceiling())
    assert len(probes) == rows[0].num_reps == 4


def test_bytes_and_their_ratio_by_hand(native):
    rows = {(row.kernel, row.provider): row for row in run(sparsity=0.75, layers=1)}
    live = 1.0 - rows["s2", "native"].sparsity
    matrix = 4 * D * F
    s2, ffn = 4 * (D + 2 * F), 4 * 2 * D
    assert rows["gate", "native"].byte_ratio == 1.0
    assert rows["s2", "native"].byte_ratio == pytest.approx((matrix + s2) / (live * matrix + s2))
    assert rows["ffn", "native"].byte_ratio == pytest.approx((3 * matrix + ffn) / ((1 + 2 * live) * matrix + ffn))
    screened = rows["ffn", "certified"].byte_ratio
    assert screened == pytest.approx((3 * matrix + ffn) / ((1 / 4 + 3 * live) * matrix + ffn))
    dense = rows["ffn", "torch"]
    assert dense.gbps == pytest.approx((3 * matrix + ffn) / (dense.p50_us * 1e3))


def test_several_tokens_a_call_count_the_neurons_live_for_any_of_them(native):
    one, three = ({(r.kernel, r.provider): r for r in run(num_tokens=n)} for n in (1, 3))
    assert all(row.gate_passed and row.num_tokens == 3 for row in three.values())
    assert ("ffn", "certified") not in three, "several tokens are not screened"
    assert three["s2", "native"].sparsity == pytest.approx(one["s2", "native"].sparsity)
    assert three["s2", "native"].byte_ratio < one["s2", "native"].byte_ratio


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_edges_of_sparsity(native, sparsity):
    rows = run(sparsity=sparsity)
    assert all(row.gate_passed for row in rows)
    assert rows[0].sparsity == sparsity


@pytest.mark.parametrize(
    ("kernel", "provider", "spoil"),
    [
        ("ffn", "native", lambda y: y * 1.001),
        ("s2", "native", lambda y: y.index_fill(-1, torch.tensor(0), math.nan)),
        ("gate", "native", lambda y: y.roll(1, -1)),
        ("ffn", "certified", lambda y: y * 1.001),
    ],
)
def test_a_wrong_kernel_is_reported_without_times(native, monkeypatch, kernel, provider, spoil):
    wrong_kind = CertifiedFFN if provider == "certified" else cpu.NativeFFN
    right = getattr(providers.Native, kernel)

    def spoilt(self, v, out=None):
        return (
            spoil(right(self, v, out))
            if type(self.kernels) is wrong_kind and self.kernels.skip_dead
            else right(self, v, out)
        )

    monkeypatch.setattr(providers.Native, kernel, spoilt)
    rows = {(row.kernel, row.provider): row for row in run()}
    wrong = rows[kernel, provider]
    assert not wrong.gate_passed
    assert not wrong.rel_err <= 1e-5
    assert wrong.num_reps == 0
    assert all(math.isnan(value) for value in (wrong.p20_us, wrong.p50_us, wrong.p80_us, wrong.gbps))
    assert rows[kernel, "native_dense"].gate_passed
    assert rows["s3", "native"].gate_passed


def test_a_kernel_that_writes_nothing_fails_the_gate(native, monkeypatch):
    monkeypatch.setattr(providers.Native, "s3", lambda self, v, out=None: out if out is not None else v.x)
    rows = {(row.kernel, row.provider): row for row in run()}
    assert not rows["s3", "native"].gate_passed
    assert math.isnan(rows["s3", "native"].rel_err)


def test_without_native_kernels_torch_is_still_measured_and_the_rest_said(monkeypatch, caplog):
    missing = cpu.Availability(False, "no compiler")
    monkeypatch.setattr(cpu, "available", lambda: missing)
    with caplog.at_level(logging.WARNING):
        rows = run()
    assert len(rows) == 14
    assert "not measured: no compiler" in caplog.text
    for row in rows:
        assert row.gate_passed == (row.provider == "torch")
        assert math.isnan(row.p50_us) == (row.provider != "torch")


def test_only_the_kernels_asked_for_are_measured(native):
    rows = run(kernels=("ffn",), num_tokens=2)
    assert [(row.kernel, row.provider) for row in rows] == [("ffn", p) for p in ("torch", "native_dense", "native")]
    assert all(row.gate_passed and row.num_reps == 4 for row in rows)


def test_the_budget_ends_the_rounds_and_progress_reaches_the_end(native):
    seen: list[tuple[float, float]] = []
    rows = run(repeats=1000, budget_s=0.0, progress=lambda done, total: seen.append((done, total)))
    assert rows[0].num_reps == 3
    assert seen[-1] == (1000, 1000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert run(repeats=4, budget_s=1e9, progress=lambda done, total: seen.append((done, total)))[0].num_reps == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_small_layers_are_copied_until_they_exceed_the_cache(native):
    made = random_case(D, F, 0.5, torch.float32)
    work, _ = bench._prepare([made[0]], [made[1]], [made[2]], 1, 1, ("torch", "native"))
    num_bytes = 3 * 4 * D * F
    assert len(work) * num_bytes >= 2 * (64 << 10) > (len(work) - 1) * num_bytes
    assert all(set(layer.providers) == {"torch", "native"} for layer in work)
    assert len({layer.weights.w_gate.data_ptr() for layer in work}) == len(work)
    assert all(torch.equal(layer.weights.w_up, made[0].w_up) for layer in work)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.89, 1.0])
def test_a_random_case_has_the_asked_sparsity_for_any_dtype_and_seed(sparsity):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        weights, x, threshold = random_case(48, 100, sparsity, dtype, seed, tokens=5)
        dead = (x.double() @ weights.w_gate.double().T < threshold).double().mean()
        assert float(dead) == pytest.approx(sparsity, abs=0.5 / 500)
        assert all(w.dtype == dtype and w.shape == (100, 48) and w.is_contiguous() for w in weights.tensors)
        again = random_case(48, 100, sparsity, dtype, seed, tokens=5)
        assert torch.equal(again[0].w_up, weights.w_up)
        assert threshold > 0


def good() -> dict:
    weights, x, threshold = random_case(D, F, 0.5, torch.float32)
    return {"layers": [weights], "inputs": [x], "thresholds": [threshold], "mask_source": "recorded"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_source": "guessed"}, "one of recorded, random"),
        ({"layers": []}, "0 layers, 1 inputs"),
        ({"thresholds": [1.0, 2.0]}, "2 thresholds"),
        ({"thresholds": [-1.0]}, "threshold is -1.0"),
        ({"inputs": [torch.zeros(3, D + 1)]}, r"inputs\[0\] is \(3, 65\)"),
        ({"inputs": [torch.zeros(D)]}, r"inputs\[0\] is \(64,\)"),
        ({"num_tokens": 9}, "at least 9"),
        ({"num_tokens": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"layers": [FFNWeights(*[torch.zeros(F, D).double()] * 3)]}, "float32, bfloat16 or float16"),
        ({"kernels": ("s2", "s4")}, "kernels are s2, s4: some of gate, s2, s3, ffn"),
        ({"kernels": ()}, "kernels are none"),
        ({"layers": [FFNWeights(torch.zeros(F, D), torch.zeros(F, D), torch.zeros(D, F))]}, "layer 0 has weights"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bench_layers(**{**good(), **change})


def test_rows_are_plain_data(native):
    row = run()[0]
    assert all(isinstance(value, str | int | float | bool | None) for value in dataclasses.asdict(row).values())
