"""The GPU benchmark without a GPU: its measuring logic on a made-up device, its gate on real numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import bench_gpu
from kernels.bench_gpu_case import DTYPES, TritonProvider, bench_case, tolerance
from kernels.bench_gpu_timing import WARM_UPS, is_cold, measure, num_copies, percentile
from kernels.gpu_peak import peak_of
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
    found = bench_gpu.predictions(rows, GPUS[0])
    assert [row["kind"] for row in found] == ["predicted"] * 3
    expected = predict(GPUS[0], Shape("", 32, 96), "s2", None, dtype="fp32")
    assert found[0]["predicted_us"] == expected.predicted_us
    assert bench_gpu.predictions(rows, None) == []


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
    monkeypatch.setattr(bench_gpu.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench_gpu.torch.cuda, "get_device_properties", lambda device: card(*CARDS["H100 PCIe"][0]))
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
    assert {row["gpu"] for row in answer["predicted"]} == {answer["gpu"]} == {"NVIDIA H100 PCIe"}
    assert answer["peak"]["bandwidth_gbps"] == pytest.approx(2039, rel=1e-3)
    timed_row = next(row for row in answer["rows"] if row["gbps"])
    assert timed_row["peak_share"] == pytest.approx(timed_row["gbps"] / answer["peak"]["bandwidth_gbps"])
    assert bench_gpu.main([*arguments, "--output", str(tmp_path / "out.json")]) == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 24


CARDS = {  # (name, capability, GiB, memory MHz, bus, multiprocessors, MHz), TB/s of the data sheet, float32 TFLOP/s
    "H100 SXM": (("NVIDIA H100 80GB HBM3", (9, 0), 80, 2619, 5120, 132, 1980), 3.35, 67),
    "H100 PCIe": (("NVIDIA H100 PCIe", (9, 0), 80, 1593, 5120, 114, 1755), 2.04, 51),
    "H100 NVL": (("NVIDIA H100 NVL", (9, 0), 94, 2619, 6016, 132, 1785), 3.94, 60),
    "A100 40 GB": (("NVIDIA A100-SXM4-40GB", (8, 0), 40, 1215, 5120, 108, 1410), 1.555, 19.5),
    "A100 80 GB": (("NVIDIA A100-SXM4-80GB", (8, 0), 80, 1593, 5120, 108, 1410), 2.039, 19.5),
    "H200": (("NVIDIA H200", (9, 0), 141, 3201, 6144, 132, 1980), 4.9, 67),
}


def card(name, capability, gib, memory_mhz, bus, units, mhz, **changes):
    said = {
        "name": name, "major": capability[0], "minor": capability[1], "total_memory": gib << 30,
        "memory_clock_rate": 1000 * memory_mhz, "memory_bus_width": bus, "multi_processor_count": units,
        "clock_rate": 1000 * mhz,
    }  # fmt: skip
    return SimpleNamespace(**{**said, **changes})


@pytest.mark.parametrize("model", CARDS)
def test_the_peaks_are_those_of_the_very_card(model):
    properties, tbps, tflops = CARDS[model]
    peak = peak_of(card(*properties))
    assert peak.reason is None
    assert peak.bandwidth_gbps == pytest.approx(1000 * tbps, rel=0.01)
    assert (peak.name, peak.memory_bytes, peak.bus_bits) == (properties[0], properties[2] << 30, properties[4])
    assert peak.gpu is not None
    assert peak.gpu.bandwidth_tbps == peak.bandwidth_gbps / 1e3
    assert peak.gpu.fp32_tflops == pytest.approx(tflops, rel=0.02)


def test_cards_of_one_name_have_peaks_of_their_own():
    rates = {model: peak_of(card(*properties)).bandwidth_gbps for model, (properties, *_) in CARDS.items()}
    assert len(set(rates.values())) == len(rates) - 1, "only the H100 PCIe and the A100 80 GB read equally fast"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory_clock_rate": 0}, "the memory clock of NVIDIA H100 80GB HBM3 is not known"),
        ({"memory_bus_width": None, "memory_clock_rate": None}, "memory clock, memory bus width of .* are not known"),
        ({"major": 8, "minor": 9}, "arithmetic of compute capability 8.9"),
        ({"clock_rate": 0}, "number and clock of its multiprocessors"),
    ],
)
def test_what_a_card_does_not_say_is_not_made_up(changes, said):
    peak = peak_of(card(*CARDS["H100 SXM"][0], **changes))
    assert peak.gpu is None
    assert re.search(f"^n/a: .*{said}", str(peak.reason))
    is_known = changes.get("memory_clock_rate", 1) and changes.get("memory_bus_width", 1)
    assert (peak.bandwidth_gbps is not None) == bool(is_known)
    old = peak_of(SimpleNamespace(name="some card", major=8, minor=0, total_memory=1 << 30))
    assert old.bandwidth_gbps is None
    assert "memory clock, memory bus width, number and clock" in str(old.reason)


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
