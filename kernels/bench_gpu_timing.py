"""How a kernel is timed on a GPU: events around a CUDA graph, with the cost of launching measured apart.

The logic knows a device through ``Device`` alone, so that it can be tested with a made-up clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
WARM_UPS = 3  # compile, choose cuBLAS algorithms, grow memory pools


class Device(Protocol):
    """What the measuring logic needs of a GPU. Times in microseconds."""

    @property
    def l2_bytes(self) -> int: ...

    def capture(self, calls: Sequence[Call]) -> Call:
        """A graph of these calls, in order; calling it replays them without launching each."""

    def elapsed_us(self, call: Call) -> float:
        """Time on the device from before the call's first kernel to after its last."""

    def host_us(self, call: Call) -> float:
        """Wall time until the call returns, on an idle device; what it launched need not be over."""

    def synced_us(self, call: Call) -> float:
        """Wall time from an idle device to an idle device."""


class CudaDevice:
    """The current CUDA device of torch."""

    @property
    def l2_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)

    def capture(self, calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def elapsed_us(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def host_us(self, call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e3

    def synced_us(self, call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - start) / 1e3


@dataclass
class Times:
    """Microseconds per call, one entry a round.

    ``graph``: device time inside a CUDA graph, the kernel's own time. ``eager``: device time when every call is
    launched by the host. ``launch``: host time to launch a call. ``synced``: wall time of one call between two waits,
    which is how the paper timed.
    """

    graph: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)
    synced: list[float] = field(default_factory=list)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else math.nan


def num_copies(bytes_read: float, layer_bytes: float, l2_bytes: int, memory_bytes: float, most: int = 64) -> int:
    """Copies of a layer to rotate through so that a call finds nothing of its last turn in the L2 cache.

    Between two calls on one copy the others read twice the cache, as far as memory and ``most`` allow; at least 1.
    """
    wanted = 1 + math.ceil(2 * l2_bytes / bytes_read) if bytes_read > 0 else most
    return max(1, min(wanted, most, int(memory_bytes // layer_bytes)))


def is_cold(copies: int, bytes_read: float, l2_bytes: int) -> bool:
    """Whether the other copies' reads push a call's weights out of the L2 cache."""
    return (copies - 1) * bytes_read >= l2_bytes


def measure(device: Device, work: Mapping[Key, Sequence[Call]], rounds: int) -> dict[Key, Times]:
    """Times every entry of ``work``: the same call on one copy of the weights after another.

    Entries take turns within a round and a different one begins each round, so that a drift of the clocks or the
    temperature meets all of them. ValueError for an entry without calls or fewer than one round.
    """
    if rounds < 1 or not all(work.values()):
        raise ValueError(f"rounds is {rounds} and the entries have {[len(c) for c in work.values()]} calls: 1 at least")
    graphs = {}
    for key, calls in work.items():
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        graphs[key] = device.capture(calls)
        graphs[key]()
    times = {key: Times() for key in work}
    keys = list(work)
    for turn in range(rounds):
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            calls, found = work[key], times[key]

            def in_turn(calls: Sequence[Call] = calls) -> None:
                for call in calls:
                    call()

            found.graph.append(device.elapsed_us(graphs[key]) / len(calls))
            found.eager.append(device.elapsed_us(in_turn) / len(calls))
            found.launch.append(device.host_us(in_turn) / len(calls))
            found.synced.append(device.synced_us(calls[turn % len(calls)]))
    return times
