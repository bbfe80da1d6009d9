"""What ``plan`` knows of devices: data-sheet peaks, memory, bandwidth. Decides no result, and needs no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from prosparse_core.errors import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak figures of a data sheet, and the share of the peak that training is taken to reach."""

    name: str
    peak_flops: float
    """Dense bf16 multiply-adds with fp32 sums, without structured sparsity, times two, a second."""
    memory_bytes: int | None
    """None: the memory of this machine, shared by all its cores."""
    bytes_per_s: float
    utilization: float
    """An assumption: large-model training at 40 to 50 % of the peak is what publications report."""
    source: str

    @property
    def is_gpu(self) -> bool:
        return self.memory_bytes is not None


CPU = Device("cpu-core", 0.1e12, None, 10e9, 1.0, "taken at 0.1 TFLOP/s; a run here replaces it by what it measured")
GPUS = (
    Device("a100-40g", 312e12, 40 * GIB, 1.555e12, 0.5, "NVIDIA A100 Tensor Core GPU data sheet (40 GB)"),
    Device("a100-80g", 312e12, 80 * GIB, 2.039e12, 0.5, "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM)"),
    Device("h100-80g", 989e12, 80 * GIB, 3.35e12, 0.4, "NVIDIA H100 Tensor Core GPU data sheet (SXM)"),
    Device("h200", 989e12, 141 * 10**9, 4.8e12, 0.4, "NVIDIA H200 Tensor Core GPU data sheet (SXM)"),
    Device("b200", 2250e12, 180 * 10**9, 8.0e12, 0.4, "NVIDIA DGX B200 data sheet, an eighth of it"),
    Device("a10", 125e12, 24 * GIB, 0.6e12, 0.4, "NVIDIA A10 Tensor Core GPU data sheet"),
    Device("l4", 121e12, 24 * GIB, 0.3e12, 0.4, "NVIDIA L4 Tensor Core GPU data sheet"),
    Device("l40s", 362.05e12, 48 * GIB, 0.864e12, 0.4, "NVIDIA L40S data sheet"),
    Device("rtx3090", 71e12, 24 * GIB, 0.936e12, 0.4, "NVIDIA Ampere GA102 whitepaper, appendix A"),
    Device("rtx4090", 165.2e12, 24 * GIB, 1.008e12, 0.4, "NVIDIA Ada whitepaper, appendix A"),
)
DEVICES = {device.name: device for device in (*GPUS, CPU)}


def find_device(name: str) -> Device:
    """The device of that name, written as people write it (``A100-80G``, ``RTX 4090``).

    Raises:
        BadInput: no such device; the hint names the nearest ones.
    """
    plain = name.lower().replace(" ", "").replace("_", "-").replace("80gb", "80g").replace("40gb", "40g")
    if plain in DEVICES:
        return DEVICES[plain]
    near = [n for n in DEVICES if n.startswith(plain)] if plain else []
    near = near or difflib.get_close_matches(plain, DEVICES, n=3, cutoff=0.4)
    raise BadInput(
        f"unknown device {name!r}",
        hint=f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(DEVICES)}",
    )
