"""What the compiler makes of the GPU kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor of 64 K registers
SCRIPT = """
import json, sys
from kernels.triton_aot import compile_ahead
arch, dtypes, aligned = json.loads(sys.argv[1])
print(json.dumps({
    name: dict(registers=info.num_registers, spilled=info.spill_bytes, shared=info.shared_bytes, arch=info.arch,
               loads={bits: info.global_loads(bits=bits) for bits in (8, 16, 32, 64, 128)},
               all_loads=info.global_loads(), sass="EXIT" in info.sass)
    for name, info in compile_ahead(arch, dtypes, aligned=aligned).items()}))
"""


def compile_in_a_process(cache: Path, arch: int, dtypes: list[str], aligned: bool = True) -> dict:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([arch, dtypes, aligned])],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_no_spills_and_weights_loaded_128_bits_at_a_time(tmp_path, arch):
    compiled = compile_in_a_process(tmp_path, arch, ["bf16", "fp32"])
    assert len(compiled) == 14
    for name, info in compiled.items():
        assert info["arch"] == arch
        assert info["sass"], f"{name}: no machine code"
        assert info["spilled"] == 0, f"{name} spills"
        assert 0 < info["registers"] <= MAX_REGISTERS, name
        assert info["shared"] <= 48 * 1024, name
        assert info["loads"]["8"] == info["loads"]["16"] == 0, f"{name}: narrow loads"
        assert sum(info["loads"].values()) == info["all_loads"]
    # a pipelined loop loads in its prologue and in its body: at least two wide loads for each weight matrix read
    for dtype in ("bf16", "fp32"):
        for kernel, matrices in (("gate_up_kernel:append", 2), ("gate_up_kernel:ordered", 2), ("s2_kernel", 1),
                                 ("down_kernel:atomic", 1), ("down_kernel:parts", 1)):  # fmt: skip
            info = compiled[f"{kernel}/{dtype}"]
            assert info["loads"]["128"] >= 2 * matrices, f"{kernel}/{dtype}: {info['loads']}"


@pytest.mark.slow
def test_the_check_can_fail_without_alignment_the_loads_shrink(tmp_path):
    compiled = compile_in_a_process(tmp_path, 80, ["bf16"], aligned=False)
    loads = compiled["gate_up_kernel:append/bf16"]["loads"]
    assert loads["128"] == 0
    assert loads["16"] > 0


def test_an_unknown_dtype_and_an_interpreted_process_are_refused(tmp_path):
    pytest.importorskip("triton")
    code = (
        "from kernels.triton_aot import compile_ahead\n"
        "for dtypes in (['int3'], ['bf16']):\n"
        "    try: compile_ahead(80, dtypes)\n"
        "    except (ValueError, RuntimeError) as error: print(type(error).__name__, error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, second = answer.stdout.splitlines()
    assert first.startswith("ValueError unknown dtypes ['int3']: one of bf16, fp16, fp32")
    assert second.startswith("RuntimeError the kernels are interpreted in this process")
