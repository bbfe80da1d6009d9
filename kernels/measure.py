"""What a measurement of memory-bound code needs: a clock, cold caches, and the bandwidth that nothing can exceed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kernels import cpu

DEFAULT_CACHE_BYTES = 32 << 20
MAX_SWEEP_BYTES = 512 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def clock(threads: int) -> tuple[str, Callable[[], int]]:
    """The timer's name and a function of nanoseconds.

    One thread: the CPU time of this process, which other processes do not stretch. Several: the wall clock, since CPU
    time would add the threads up.
    """
    return ("process_cpu", time.process_time_ns) if threads == 1 else ("wall", time.perf_counter_ns)


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first CPU; 32 MiB where the system does not say."""
    sizes = []
    for entry in _CACHES.glob("index*/size"):
        text = entry.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes, default=DEFAULT_CACHE_BYTES)


class CacheSweep:
    """Call it to push everything else out of the caches, by reading twice the last level's size.

    Reads, not writes: dirty lines would be written back during the measurement that follows.
    """

    def __init__(self) -> None:
        num_bytes = min(2 * last_level_cache_bytes(), MAX_SWEEP_BYTES)
        self._memory = torch.ones(num_bytes // 4)

    def __call__(self) -> None:
        self._memory.sum()


def read_bandwidth_gbps(threads: int = 1, *, num_bytes: int = 256 << 20, repeats: int = 7) -> float:
    """The best rate at which this machine was seen to read memory just now, in 1e9 bytes/s.

    Sequential reads of ``num_bytes`` (make it much more than the last-level cache), best of ``repeats``: what every
    kernel here is measured against. RuntimeError where native kernels cannot be built.
    """
    library = cpu.load()
    library.check_threads(threads)
    memory = torch.ones(num_bytes // 4)
    _, now = clock(threads)
    best_ns = None
    for _ in range(repeats + 1):  # the first one warms the page tables up
        start = now()
        library.read(memory.data_ptr(), memory.numel(), threads)
        elapsed = now() - start
        best_ns = elapsed if best_ns is None else min(best_ns, elapsed)
    return num_bytes / max(best_ns or 1, 1)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch limited to that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
