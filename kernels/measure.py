"""What a measurement of memory-bound code needs: a clock, cold caches, and the rate at which memory can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kernels import cpu

DEFAULT_CACHE_BYTES = 32 << 20
MAX_SWEEP_BYTES = 512 << 20
CEILING_CACHES = 4  # what the ceiling reads, in last-level caches
MIN_CEILING_BYTES, MAX_CEILING_BYTES = 128 << 20, 1 << 30
Pattern = tuple[int, int]
PATTERNS: tuple[Pattern, ...] = ((1, 1024), (1, 0), (2, 1024), (4, 0), (4, 1024), (8, 0), (8, 1024))
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


def fits_cache(num_bytes: float) -> str | None:
    """Why bytes say nothing of the time that weights of that size take: they fit into the cache. None: they do not."""
    cache = last_level_cache_bytes()
    if num_bytes > cache:
        return None
    return f"n/a: the weights, {num_bytes / 2**20:.1f} MiB, fit into the last-level cache of {cache / 2**20:g} MiB"


class ReadCeiling:
    """The best rate at which this machine was seen to read memory, in 1e9 bytes/s, over several access patterns.

    Each pattern (``PATTERNS``: streams a thread, floats prefetched ahead) sums a block of several times the last-level
    cache in the widest vectors. Like the kernels' weights the block is packed (:func:`kernels.cpu.pack`), where huge
    pages are asked for. Probes belong between the measurements that are held against them, with as many threads.
    RuntimeError where native kernels cannot be built.
    """

    def __init__(self, threads: int = 1, *, num_bytes: int | None = None, rounds: int = 2) -> None:
        self._library = cpu.load()
        self._library.check_threads(threads)
        self._threads, self._turn = threads, 0
        _, self._now = clock(threads)
        wanted = CEILING_CACHES * last_level_cache_bytes() if num_bytes is None else num_bytes
        size = min(max(wanted, MIN_CEILING_BYTES), MAX_CEILING_BYTES) if num_bytes is None else num_bytes
        (self._memory,) = cpu.pack([torch.ones(size // 4)])
        self.seen: dict[Pattern, float] = dict.fromkeys(PATTERNS, 0.0)
        self.probe_all(rounds)

    @property
    def gbps(self) -> float:
        """The best of all patterns and probes so far."""
        return max(self.seen.values())

    def probe(self) -> None:
        """Read the block once, by the next pattern in turn."""
        pattern = PATTERNS[self._turn % len(PATTERNS)]
        self._turn += 1
        start = self._now()
        self._library.read(self._memory.data_ptr(), self._memory.numel(), *pattern, self._threads)
        elapsed = max(self._now() - start, 1)
        self.seen[pattern] = max(self.seen[pattern], self._memory.nbytes / elapsed)

    def probe_all(self, rounds: int = 1) -> None:
        """Every pattern so many times."""
        for _ in range(rounds * len(PATTERNS)):
            self.probe()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch limited to that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
