"""What a GPU can do at most, from what the device says of itself: a name such as "H100" covers several cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.roofline import Gpu

RATES = {(8, 0): (128, 1024), (9, 0): (256, 2048)}
"""By compute capability: float32 and TF32 operations that a multiprocessor starts in a cycle (NVIDIA's architecture
papers of Ampere GA100 and Hopper GH100). Both only bound several tokens and float32: one token is bound by memory."""


@dataclass(frozen=True)
class Peak:
    """Memory and peaks of one device. What it does not say is None, and ``reason`` says what is missing."""

    name: str
    memory_bytes: int | None
    memory_clock_mhz: float | None
    bus_bits: int | None
    bandwidth_gbps: float | None
    """Two transfers a clock over the whole bus."""
    gpu: Gpu | None
    """For predictions; None where the bandwidth or the arithmetic is not known."""
    reason: str | None


def peak_of(properties: Any) -> Peak:
    """The peaks of a device from ``torch.cuda.get_device_properties``, which asks the driver; of none by its name.

    Bandwidth is 2 x memory clock x bus width, which gives the data sheets' figures: 3.35 TB/s of an H100 SXM, 2.04 of
    an H100 PCIe and of an A100 80 GB, 1.56 of an A100 40 GB.
    """
    name = str(properties.name)
    memory, clock_khz, bus = (_said(properties, n) for n in ("total_memory", "memory_clock_rate", "memory_bus_width"))
    missing = [words for words, value in (("memory clock", clock_khz), ("memory bus width", bus)) if value is None]
    bandwidth = None if clock_khz is None or bus is None else 2.0 * clock_khz * 1e3 * bus / 8 / 1e9
    capability = (int(properties.major), int(properties.minor))
    units, core_khz = _said(properties, "multi_processor_count"), _said(properties, "clock_rate")
    if capability not in RATES:
        missing.append(f"arithmetic of compute capability {capability[0]}.{capability[1]}")
    elif units is None or core_khz is None:
        missing.append("number and clock of its multiprocessors")
    gpu = None
    if bandwidth is not None and units is not None and core_khz is not None and capability in RATES:
        fp32, tf32 = (rate * units * core_khz * 1e3 / 1e12 for rate in RATES[capability])
        gpu = Gpu(name, bandwidth / 1e3, fp32, tf32)
    reason = (
        f"n/a: the {', '.join(missing)} of {name} {'is' if len(missing) == 1 else 'are'} not known" if missing else None
    )
    return Peak(name, memory, None if clock_khz is None else clock_khz / 1e3, bus, bandwidth, gpu, reason)


def _said(properties: Any, name: str) -> int | None:
    """A property that this torch has and the driver answered."""
    value = getattr(properties, name, None)
    return int(value) if value else None
