"""Compiles the GPU kernels ahead of time, for a GPU that need not be there, and reads what the compiler made of them.

What a test can hold without a GPU: no spilled registers, weights loaded 128 bits at a time by copies that do not wait
(cp.async, LDGSTS in machine code), tensor cores where several tokens share a weight. All are lost silently: without
the knowledge that D is a multiple of 16, every load shrinks to 16 bits and waits. Needs triton with its bundled
cuobjdump and nvdisasm. A process in which the kernels are interpreted (``TRITON_INTERPRET=1``) cannot compile them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import triton_batch, triton_ffn, triton_kernels
from kernels.triton_ffn import BATCH, ONE_TOKEN, Tiles

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
        return self._count(r"LDG(?:STS)?", bits)

    def async_copies(self, *, bits: int | None = None) -> int:
        """Of those, the ones that go to shared memory without waiting: cp.async in PTX, LDGSTS in machine code."""
        return self._count("LDGSTS", bits)

    def local_accesses(self) -> int:
        """Loads and stores of a thread's local memory, where spilled registers go."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    def tensor_products(self) -> int:
        """Instructions of the tensor cores."""
        return len(re.findall(r"\b(?:HMMA|HGMMA)\b", self.sass))

    def _count(self, instruction: str, bits: int | None) -> int:
        found = re.findall(rf"\b{instruction}(?:\.([A-Z0-9_.]+))?\s", self.sass)
        widths = [_load_bits(modifiers) for modifiers in found]
        return len(widths) if bits is None else widths.count(bits)


def _load_bits(modifiers: str) -> int:
    for token in modifiers.split("."):
        if token in ("64", "128", "256"):
            return int(token)
        if token in ("U8", "S8", "U16", "S16"):
            return int(token[1:])
    return 32


def compile_ahead(
    arch: int, dtypes: Sequence[str] = DTYPES, *, only: str = "", aligned: bool = True
) -> dict[str, CompiledInfo]:
    """The kernels of ``triton_ffn`` whose name starts with ``only``, for ``sm_<arch>`` (80, 90, ...).

    Keys are ``kernel/dtype``, or ``kernel:variant/dtype`` where a constant argument makes two kernels of one function.
    Kernels that read no weights come with fp32 alone.
    ``aligned`` says that D is a multiple of 16 and every pointer of 16 bytes, as at run time for all real models.
    Raises ValueError for an unknown dtype or name and RuntimeError under the interpreter or when a tool fails.
    """
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"unknown dtypes {sorted(unknown)}: one of {', '.join(DTYPES)}")
    if triton_ffn.interpreted():
        raise RuntimeError("the kernels are interpreted in this process (TRITON_INTERPRET=1): compile in another one")
    compiled = {}
    for dtype in dtypes:
        for name, signature, constants, tiles in _variants(dtype):
            if name.startswith(only):
                compiled[f"{name}/{dtype}"] = _compile(name, arch, signature, constants, tiles.num_warps, aligned)
    if not compiled:
        raise ValueError(f"no kernel's name starts with {only!r}")
    return compiled


def _variants(dtype: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any], Tiles]]:
    """Name (``function`` or ``function:variant``), argument types, constants and tiles of every kernel."""
    weight, real, index = f"*{dtype}", "*fp32", "*i32"
    found = {"list_row_ptr": index, "list_value_ptr": real, "count_ptr": index, "x1_ptr": real}
    sizes = {"num_tokens": "i32", "F": "i32", "D": "i32", "capacity": "i32"}
    one = {name: kind for name, kind in sizes.items() if name != "num_tokens"}
    gates = {"x_ptr": weight, "gate_ptr": weight, "up_ptr": weight, **found}
    down = {**found, "down_ptr": weight, "y_ptr": real}
    s2 = {"s_ptr": real, "x_ptr": weight, "up_ptr": weight, "x1_ptr": real, "F": "i32", "D": "i32"}
    compact = {**found, "F": "i32", "capacity": "i32"}
    precision = "tf32x3" if dtype == "fp32" else "tf32"
    for batch, tiles, arguments in ((False, ONE_TOKEN, one), (True, BATCH[precision], sizes)):
        name = "batch_kernel" if batch else "kernel"
        tokens: dict[str, Any] = {"TOKENS": triton_ffn.MAX_TOKENS} if batch else {}
        wide: dict[str, Any] = {"ROWS": tiles.rows, "COLS": tiles.cols, "STAGES": tiles.num_stages, **tokens}
        if batch:
            wide["PRECISION"] = precision
        listed = {"ROWS": tiles.list_rows, "COLS": tiles.list_cols, "SPLIT": tiles.split, "STAGES": tiles.num_stages}
        for variant, flag in (("append", True), ("ordered", False)):
            scalars = {**arguments, "threshold": "fp32"}
            yield f"gate_up_{name}:{variant}", {**gates, **scalars}, {**wide, "APPEND": flag}, tiles
        for variant, flag in (("atomic", True), ("parts", False)):
            yield f"down_{name}:{variant}", {**down, **arguments}, {**listed, **tokens, "ATOMIC": flag}, tiles
    yield "s2_kernel", s2, {"ROWS": ONE_TOKEN.rows, "COLS": ONE_TOKEN.cols, "STAGES": ONE_TOKEN.num_stages}, ONE_TOKEN
    if dtype != "fp32":
        return  # the rest hold float32 whatever the weights are
    for width in (1, triton_ffn.MAX_TOKENS):
        scan = {"SCAN_ROWS": triton_ffn.SCAN, "BEFORE_ROWS": triton_ffn.BEFORE // width, "TOKENS": width}
        yield f"compact_kernel:{width}", compact, scan, ONE_TOKEN
    reduce = {"SPLIT": ONE_TOKEN.split, "COLS": ONE_TOKEN.list_cols}
    yield "reduce_kernel", {"part_ptr": real, "y_ptr": real, "num_values": "i32"}, reduce, ONE_TOKEN


def _compile(
    name: str, arch: int, arguments: dict[str, str], constants: dict[str, Any], num_warps: int, aligned: bool
) -> CompiledInfo:
    module = triton_batch if "_batch_" in name else triton_kernels
    function = getattr(module, name.partition(":")[0])
    signature = {name: arguments.get(name, "constexpr") for name in function.arg_names}
    by_16 = [["tt.divisibility", 16]]
    attributes = {
        (function.arg_names.index(argument),): by_16
        for argument, kind in arguments.items()
        if aligned and (kind.startswith("*") or argument in ("D", "num_values"))
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
