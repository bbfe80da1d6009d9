"""Compiles the GPU kernels ahead of time, for a GPU that need not be there, and reads what the compiler made of them.

What a test can hold without a GPU: no spilled registers, and weights loaded 128 bits at a time. Both are lost silently:
without the knowledge that D is a multiple of 16, every load shrinks to 16 bits. Needs triton with its bundled
cuobjdump and nvdisasm. A process in which the kernels are interpreted (``TRITON_INTERPRET=1``) cannot compile them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import triton_ffn
from kernels.triton_ffn import Tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = ("bf16", "fp16", "fp32")
WARP_SIZE = 32
TIMEOUT_S = 120


@dataclass(frozen=True)
class CompiledInfo:
    """One kernel as compiled for one GPU. Sizes in bytes; ``spill_bytes`` is local memory and stack of a thread."""

    name: str
    arch: int
    num_registers: int
    spill_bytes: int
    shared_bytes: int
    sass: str = field(repr=False)

    def global_loads(self, *, bits: int | None = None) -> int:
        """Load instructions from global memory (LDG, LDGSTS) in the code; of one width if ``bits`` is given."""
        widths = [_load_bits(modifiers) for modifiers in re.findall(r"\bLDG(?:STS)?\.([A-Z0-9_.]+)", self.sass)]
        return len(widths) if bits is None else widths.count(bits)


def _load_bits(modifiers: str) -> int:
    for token in modifiers.split("."):
        if token in ("64", "128", "256"):
            return int(token)
        if token in ("U8", "S8", "U16", "S16"):
            return int(token[1:])
    return 32


def compile_ahead(
    arch: int, dtypes: Sequence[str] = ("bf16", "fp32"), *, tiles: Tiles | None = None, aligned: bool = True
) -> dict[str, CompiledInfo]:
    """Every kernel of ``triton_ffn`` for ``sm_<arch>`` (80, 90, ...), by ``kernel/dtype``.

    ``aligned`` says that D is a multiple of 16 and every pointer of 16 bytes, as at run time for all real models.
    Raises ValueError for an unknown dtype and RuntimeError under the interpreter or when a tool fails.
    """
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"unknown dtypes {sorted(unknown)}: one of {', '.join(DTYPES)}")
    if triton_ffn.interpreted():
        raise RuntimeError("the kernels are interpreted in this process (TRITON_INTERPRET=1): compile in another one")
    shape = tiles or Tiles()
    compiled = {}
    for dtype in dtypes:
        for name, (signature, constants) in _variants(dtype, shape).items():
            compiled[f"{name}/{dtype}"] = _compile(name, arch, signature, constants, shape.num_warps, aligned)
    return compiled


def _variants(dtype: str, tiles: Tiles) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Argument types and constants of every kernel, by ``function`` or ``function:variant``."""
    weight, real, index = f"*{dtype}", "*fp32", "*i32"
    gate_up = {
        "x_ptr": weight, "gate_ptr": weight, "up_ptr": weight, "list_row_ptr": index, "list_value_ptr": real,
        "count_ptr": index, "x1_ptr": real, "F": "i32", "D": "i32", "threshold": "fp32",
    }  # fmt: skip
    s2 = {"s_ptr": real, "x_ptr": weight, "up_ptr": weight, "x1_ptr": real, "F": "i32", "D": "i32"}
    compact = {"x1_ptr": real, "list_row_ptr": index, "list_value_ptr": real, "count_ptr": index, "F": "i32"}
    down = {
        "list_row_ptr": index, "list_value_ptr": real, "count_ptr": index,
        "down_ptr": weight, "y_ptr": real, "D": "i32",
    }  # fmt: skip
    wide = {"ROWS": tiles.rows, "COLS": tiles.cols, "STAGES": tiles.num_stages}
    split = {"SPLIT": tiles.split, "COLS": tiles.list_cols}
    listed = {"ROWS": tiles.list_rows, "STAGES": tiles.num_stages, **split}
    return {
        "gate_up_kernel:append": (gate_up, {**wide, "APPEND": True}),
        "gate_up_kernel:ordered": (gate_up, {**wide, "APPEND": False}),
        "s2_kernel": (s2, wide),
        "compact_kernel": (compact, {"SCAN_ROWS": triton_ffn.SCAN}),
        "down_kernel:atomic": (down, {**listed, "ATOMIC": True}),
        "down_kernel:parts": (down, {**listed, "ATOMIC": False}),
        "reduce_kernel": ({"part_ptr": real, "y_ptr": real, "D": "i32"}, split),
    }


def _compile(
    name: str, arch: int, arguments: dict[str, str], constants: dict[str, Any], num_warps: int, aligned: bool
) -> CompiledInfo:
    function = getattr(triton_ffn, name.partition(":")[0])
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    by_16 = [["tt.divisibility", 16]]
    attributes = {
        (function.arg_names.index(argument),): by_16
        for argument, kind in arguments.items()
        if aligned and (kind.startswith("*") or argument == "D")
    }
    source = ASTSource(
        function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, attributes
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if figures.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage of {name} says nothing of registers: {usage.strip()!r}")
    spilled = figures["STACK"] + figures["LOCAL"]
    return CompiledInfo(name, arch, figures["REG"], spilled, int(kernel.metadata.shared), sass)


def _run(tool: str, *arguments: str) -> str:
    try:
        return subprocess.run(
            [TOOLS / tool, *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{tool} of triton {triton.__version__} failed: {error}") from error
