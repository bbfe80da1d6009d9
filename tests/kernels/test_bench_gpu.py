"""The GPU benchmark without a GPU: its measuring logic on a made-up device, its gate on real numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench_gpu
from kernels.bench_gpu_case import DTYPES, TritonProvider, bench_case, tolerance
from kernels.bench_gpu_timing import WARM_UPS, is_cold, measure, num_copies, percentile
from kernels.providers import DenseTorch
from kernels.roofline import GPUS, Shape, predict

REPOSITORY = Path(__file__).parents[2]
LAUNCH_US, WAIT_US = 5.0, 20.0


class FakeDevice:
    """A device on which a call costs what ``cost_us`` says, a launch LAUNCH_US, and nothing else takes time."""

    def __init__(self, l2_bytes: int = 1000) -> None:
        self.l2_bytes = l2_bytes
        self.device_us = self.host_clock_us = 0.0
        self.ran: list[str] = []
        self.replaying = False

    def call(self, name: str, cost_us: float):
        def run() -> None:
            self.ran.append(name)
            self.device_us += cost_us if self.replaying else max(cost_us, LAUNCH_US)
            self.host_clock_us += 0.0 if self.replaying else LAUNCH_US

        return run

    def capture(self, calls):
        def replay() -> None:
            self.replaying = True
            for call in calls:
                call()
            self.replaying = False

        return replay

    def elapsed_us(self, call) -> float:
        before = self.device_us
        call()
        return self.device_us - before

    def host_us(self, call) -> float:
        before = self.host_clock_us
        call()
        return self.host_clock_us - before

    def synced_us(self, call) -> float:
        return self.elapsed_us(call) + WAIT_US


def test_the_graph_gives_the_kernels_own_time_and_launching_is_apart():
    device = FakeDevice()
    work = {
        "fast": [device.call(f"fast{i}", 2.0) for i in range(3)],
        "slow": [device.call(f"slow{i}", 50.0) for i in range(3)],
    }
    times = measure(device, work, rounds=4)
    assert times["fast"].graph == [2.0] * 4
    assert times["fast"].eager == [LAUNCH_US] * 4, "the host cannot keep up"
    assert times["slow"].eager == [50.0] * 4
    assert times["fast"].launch == times["slow"].launch == [LAUNCH_US] * 4
    assert times["slow"].synced == [50.0 + WAIT_US] * 4


def test_copies_rotate_and_entries_take_turns():
    device = FakeDevice()
    work = {name: [device.call(f"{name}{i}", 1.0) for i in range(2)] for name in ("a", "b")}
    measure(device, work, rounds=2)
    warm = WARM_UPS + 1  # and one replay of the graph
    assert device.ran[: 2 * warm] == ["a0", "a1"] * warm
    timed = device.ran[4 * warm :]
    sweep_a, sweep_b = ["a0", "a1"] * 3, ["b0", "b1"] * 3  # graph, eager, launch
    assert timed == [*sweep_a, "a0", *sweep_b, "b0", *sweep_b, "b1", *sweep_a, "a1"]


@pytest.mark.parametrize(("work", "rounds"), [({"a": []}, 1), ({"a": [print]}, 0)])
def test_nothing_to_measure_is_refused(work, rounds):
    with pytest.raises(ValueError, match="1 at least"):
        measure(FakeDevice(), work, rounds)


def test_as_many_copies_as_push_the_weights_out_of_the_cache():
    assert num_copies(bytes_read=10.0, layer_bytes=100.0, l2_bytes=40, memory_bytes=1e6) == 9
    assert num_copies(bytes_read=1e9, layer_bytes=1e9, l2_bytes=40, memory_bytes=1e12) == 2
    assert num_copies(bytes_read=0.0, layer_bytes=100.0, l2_bytes=40, memory_bytes=1e6) == 64
    assert num_copies(bytes_read=1.0, layer_bytes=100.0, l2_bytes=40, memory_bytes=450.0) == 4
    assert num_copies(bytes_read=1.0, layer_bytes=100.0, l2_bytes=40, memory_bytes=50.0) == 1
    assert is_cold(9, 10.0, 40)
    assert not is_cold(4, 10.0, 40)
    assert not is_cold(1, 1e9, 40)


class WrongDown(DenseTorch):
    """Reads one dead row too many."""

    def s3(self, v, out=None):
        return super().s3(v) + self.w_down[:, 0]


class WrongLiveSet(DenseTorch):
    def gate(self, v, out=None):
        return -super().gate(v) + 1.0


def make_dense(weights, threshold):
    return {
        "torch": DenseTorch(weights, threshold),
        "wrong_down": WrongDown(weights, threshold),
        "wrong_live": WrongLiveSet(weights, threshold),
    }


@pytest.fixture
def timed(monkeypatch):
    """A fake device that runs the real call and lets a microsecond pass."""

    class Running(FakeDevice):
        def capture(self, calls):
            return lambda: [call() for call in calls]

        def elapsed_us(self, call):
            call()
            return 6.0

        host_us = synced_us = elapsed_us

    return Running(l2_bytes=1 << 14)


def test_a_case_is_gated_before_it_is_timed(timed):
    rows = bench_case(
        timed, "cpu", d_model=32, d_ff=96, dtype="fp32", sparsity=0.75, num_tokens=1, rounds=3, memory_bytes=1e9,
        make=make_dense,
    )  # fmt: skip
    by = {(row.kernel, row.provider): row for row in rows}
    assert len(rows) == 9
    assert [key for key, row in by.items() if not row.gate_passed] == [("s3", "wrong_down"), ("ffn", "wrong_live")]
    wrong = by["s3", "wrong_down"]
    assert wrong.rel_err > 0.01
    assert (wrong.p50_us, wrong.eager_p50_us, wrong.gbps, wrong.num_reps) == (None, None, None, 0)
    assert by["ffn", "wrong_live"].rel_err is None
    good = by["s2", "torch"]
    assert good.rel_err < 1e-5
    assert good.sparsity == pytest.approx(0.75)
    assert good.live == pytest.approx(0.25)
    # a copy's live rows are 24 x 32 x 4 bytes: 11 copies read twice 16 KiB between two calls on one
    assert good.num_copies == 12
    assert good.cold
    assert good.p50_us == good.p20_us == 6.0 / 12
    assert good.synced_p50_us == 6.0
    assert good.gbps == pytest.approx(96 * 32 * 4 / 0.5e3)


def test_several_tokens_are_for_the_whole_ffn_alone(timed):
    rows = bench_case(
        timed, "cpu", d_model=32, d_ff=96, dtype="bf16", sparsity=0.75, num_tokens=4, rounds=1, memory_bytes=1e9,
        make=make_dense,
    )  # fmt: skip
    assert {row.kernel for row in rows} == {"ffn"}
    assert rows[0].gate_passed
    assert rows[0].live > 1 - rows[0].sparsity, "the union of four tokens"
    assert rows[0].num_tokens == 4


def test_tolerances_follow_the_roundings():
    assert tolerance("torch", "ffn", torch.float32) == tolerance("triton", "ffn", torch.float32) == 1e-5
    assert tolerance("triton", "s2", torch.bfloat16) == 1e-5, "sums and results are float32"
    assert tolerance("triton", "ffn", torch.bfloat16) == pytest.approx(1e-5 + 2**-7)
    assert tolerance("triton", "ffn", torch.float16) == pytest.approx(1e-5 + 2**-10)
    assert set(DTYPES) == {"bf16", "fp16", "fp32"}


def test_predictions_are_a_list_of_their_own(timed):
    rows = bench_case(
        timed, "cpu", d_model=32, d_ff=96, dtype="fp32", sparsity=0.5, num_tokens=1, rounds=1, memory_bytes=1e9,
        make=lambda weights, threshold: {"torch": DenseTorch(weights, threshold)},
    )  # fmt: skip
    found = bench_gpu.predictions(rows, "NVIDIA A100-SXM4-80GB")
    assert [row["kind"] for row in found] == ["predicted"] * 3
    expected = predict(GPUS[0], Shape("", 32, 96), "s2", None, dtype="fp32")
    assert found[0]["predicted_us"] == expected.predicted_us
    assert bench_gpu.predictions(rows, "NVIDIA L4") == []


def test_a_kernel_that_does_nothing_is_the_floor(timed):
    assert bench_gpu.launch_costs(timed, "cpu", 3) == {
        "graph_us": 6.0 / 32, "eager_us": 6.0 / 32, "launch_us": 6.0 / 32, "synced_us": 6.0,
    }  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--output", str(tmp_path / "out.json")]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "no CUDA device here, so nothing was measured" in said.err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "'4096' is no shape"),
        (["--shapes", "0x5"], "'0x5' is no shape"),
        (["--sparsity", "0.5,1.5"], "'1.5' is no share"),
        (["--sparsity", "most"], "'most' is no share"),
        (["--tokens", "1,9"], "'9': from 1 to 8"),
        (["--rounds", "0"], "'0': at least 1"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_before_anything_else(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_whole_run_on_a_made_up_gpu(monkeypatch, capsys, tmp_path, timed):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu.torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    monkeypatch.setattr(bench_gpu.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_gpu.torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    monkeypatch.setattr(bench_gpu, "CudaDevice", lambda: timed)
    monkeypatch.setattr(bench_gpu, "launch_costs", lambda device, where, rounds: {"graph_us": 1.0})
    real = bench_case
    monkeypatch.setattr(
        bench_gpu, "bench_case", lambda device, where, **options: real(device, "cpu", make=make_dense, **options)
    )
    arguments = ["--shapes", "32x96", "--tokens", "1,2", "--sparsity", "0.5,0.9", "--dtype", "fp32", "--rounds", "2"]
    assert bench_gpu.main(arguments) == 1, "two of the providers are wrong"
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "measured"
    assert len(answer["rows"]) == 2 * (9 + 3)
    assert answer["rows"][0]["p50_us"] > 0
    assert {row["gpu"] for row in answer["predicted"]} == {"H100-80G"}
    assert bench_gpu.main([*arguments, "--output", str(tmp_path / "out.json")]) == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 24


SCRIPT = """
import json
from dataclasses import asdict
from kernels.bench_gpu_case import bench_case

class Device:
    l2_bytes = 1
    capture = staticmethod(lambda calls: lambda: [call() for call in calls])
    elapsed_us = host_us = synced_us = staticmethod(lambda call: 1.0)

rows = []
for tokens, dtype in ((1, "bf16"), (2, "fp16")):
    rows += bench_case(Device(), "cpu", d_model=24, d_ff=40, dtype=dtype, sparsity=0.75, num_tokens=tokens, rounds=1,
                       memory_bytes=1.0)
print(json.dumps([asdict(row) for row in rows]))
"""


def test_the_triton_kernels_pass_its_gate_in_the_interpreter():
    pytest.importorskip("triton")
    assert {"s2", "s3", "ffn", "gate"} <= vars(TritonProvider).keys()
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)
    assert [(r["kernel"], r["provider"]) for r in rows[:3]] == [
        ("s2", "torch"), ("s2", "triton"), ("s2", "triton_deterministic"),
    ]  # fmt: skip
    assert len(rows) == 9 + 3
    for row in rows:
        assert row["gate_passed"], row
        assert row["p50_us"] == 1.0
        assert not row["cold"], "one copy is warm, and the row says so"


def test_percentiles():
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([], 50) != percentile([], 50), "nan"
