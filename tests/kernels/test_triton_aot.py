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
# kernel: weight matrices read, whether tensor cores multiply
STREAMING = {
    "gate_up_kernel:append": (2, False),
    "gate_up_kernel:ordered": (2, False),
    "s2_kernel": (1, False),
    "down_kernel:atomic": (1, False),
    "down_kernel:parts": (1, False),
    "gate_up_batch_kernel:append": (2, True),
    "gate_up_batch_kernel:ordered": (2, True),
    "down_batch_kernel:atomic": (1, True),
    "down_batch_kernel:parts": (1, True),
}
HELPERS = ("compact_kernel:1", "compact_kernel:8", "reduce_kernel")
SCRIPT = """
import json, sys
from kernels.triton_aot import compile_ahead
arch, dtypes, only, aligned = json.loads(sys.argv[1])
print(json.dumps({
    name: dict(registers=info.num_registers, spilled=info.spill_bytes, shared=info.shared_bytes, arch=info.arch,
               local=info.local_accesses(), tensor=info.tensor_products(),
               loads={bits: info.global_loads(bits=bits) for bits in (8, 16, 32, 64, 128)},
               copies={bits: info.async_copies(bits=bits) for bits in (8, 16, 32, 64, 128)},
               all_loads=info.global_loads(), sass="EXIT" in info.sass)
    for name, info in compile_ahead(arch, dtypes, only=only, aligned=aligned).items()}))
"""
SASS = """
        /*0a10*/                   LDGSTS.E.BYPASS.128 [R21+0x400], [R8.64], P0 ;
        /*0a20*/              @P1 LDGSTS.E [R21], [R8.64] ;
        /*0a30*/                   LDG.E.128 R4, [R2.64] ;
        /*0a40*/                   LDG.E.EF.U16 R4, [R2.64] ;
        /*0a50*/                   LDGDEPBAR ;
        /*0a60*/                   LDL.LU R7, [R1+0x8] ;
        /*0a70*/                   STL [R1+0x8], R7 ;
        /*0a80*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
"""


def compile_in_a_process(cache: Path, arch: int, dtypes: list[str], only: str = "", aligned: bool = True) -> dict:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([arch, dtypes, only, aligned])],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtypes"), [(80, ["bf16", "fp32"]), (90, ["fp16", "fp32"])])
def test_no_spills_and_weights_copied_128_bits_at_a_time(tmp_path, arch, dtypes):
    compiled = compile_in_a_process(tmp_path, arch, dtypes)
    assert set(compiled) == {f"{kernel}/{dtype}" for kernel in STREAMING for dtype in dtypes} | {
        f"{k}/fp32" for k in HELPERS
    }
    for name, info in compiled.items():
        assert info["arch"] == arch
        assert info["sass"], f"{name}: no machine code"
        assert info["spilled"] == info["local"] == 0, f"{name} spills"
        assert 0 < info["registers"] <= MAX_REGISTERS, name
        assert info["shared"] <= 48 * 1024, name
        assert info["loads"]["8"] == info["loads"]["16"] == 0, f"{name}: narrow loads"
        assert sum(info["loads"].values()) == info["all_loads"]
        assert info["loads"]["128"] > 0, name
        kernel = name.partition("/")[0]
        if kernel in HELPERS:
            continue
        # a pipelined loop copies in its prologue and in its body: at least two wide copies for each matrix read
        matrices, on_tensor_cores = STREAMING[kernel]
        assert info["copies"]["128"] >= 2 * matrices, f"{name}: {info['copies']}"
        assert info["copies"]["128"] == info["loads"]["128"], f"{name}: wide loads that wait"
        assert (info["tensor"] > 0) == on_tensor_cores, name


@pytest.mark.slow
def test_the_check_can_fail_without_alignment_the_loads_shrink_and_wait(tmp_path):
    compiled = compile_in_a_process(tmp_path, 80, ["bf16"], only="gate_up_kernel:append", aligned=False)
    (info,) = compiled.values()
    assert info["loads"]["128"] == info["copies"]["128"] == 0
    assert info["loads"]["16"] > 0


def test_what_is_counted_in_machine_code():
    pytest.importorskip("triton")
    from kernels.triton_aot import CompiledInfo

    info = CompiledInfo("made up", 80, 64, 0, 0, SASS)
    assert [info.global_loads(bits=bits) for bits in (16, 32, 64, 128)] == [1, 1, 0, 2]
    assert [info.async_copies(bits=bits) for bits in (16, 32, 64, 128)] == [0, 1, 0, 1]
    assert (info.global_loads(), info.async_copies()) == (4, 2)
    assert info.local_accesses() == 2
    assert info.tensor_products() == 1


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
