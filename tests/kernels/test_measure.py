from __future__ import annotations

import time

import pytest
import torch

from kernels import measure


def test_the_clock_of_one_thread_is_cpu_time_and_stands_still_while_sleeping():
    name, now = measure.clock(1)
    start = now()
    time.sleep(0.2)
    assert name == "process_cpu"
    assert now() - start < 100e6


def test_the_clock_of_several_threads_is_the_wall():
    name, now = measure.clock(2)
    start = now()
    time.sleep(0.05)
    assert name == "wall"
    assert now() - start >= 50e6


def test_the_last_level_cache_is_the_largest(monkeypatch, tmp_path):
    for index, size in enumerate(["48K", "2M", "33792K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(measure, "_CACHES", tmp_path)
    assert measure.last_level_cache_bytes() == 33792 * 1024
    monkeypatch.setattr(measure, "_CACHES", tmp_path / "nowhere")
    assert measure.last_level_cache_bytes() == measure.DEFAULT_CACHE_BYTES


def test_the_sweep_reads_twice_the_cache_within_its_limit(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 1 << 20)
    sweep = measure.CacheSweep()
    assert sweep._memory.numel() * 4 == 2 << 20
    sweep()
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 1 << 40)
    monkeypatch.setattr(measure, "MAX_SWEEP_BYTES", 3 << 20)
    assert measure.CacheSweep()._memory.numel() * 4 == 3 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_the_ceiling_is_the_best_of_several_patterns(native, threads):
    ceiling = measure.ReadCeiling(threads, num_bytes=16 << 20, rounds=2)
    assert set(ceiling.seen) == set(measure.PATTERNS)
    assert len({streams for streams, _ in measure.PATTERNS}) > 2, "one stream alone is not what kernels reach"
    assert 0.1 < min(ceiling.seen.values()) <= ceiling.gbps == max(ceiling.seen.values()) < 2000
    single = max(rate for (streams, _), rate in ceiling.seen.items() if streams == 1)
    assert ceiling.gbps >= single
    before = dict(ceiling.seen)
    ceiling.probe_all()
    assert all(ceiling.seen[p] >= rate for p, rate in before.items()), "a slow moment takes nothing back"


def test_the_ceiling_is_a_maximum_over_patterns_and_probes(native, monkeypatch):
    """By a made-up clock: eight streams read in a quarter of the time, once."""
    ceiling = measure.ReadCeiling(1, num_bytes=1 << 20, rounds=1)
    times = {streams: 1 << (20 if streams < 8 else 18) for streams, _ in measure.PATTERNS}
    ticks = [0]
    ceiling.seen = dict.fromkeys(measure.PATTERNS, 0.0)
    monkeypatch.setattr(ceiling, "_now", lambda: ticks[0])

    class Slow:
        def read(self, address, floats, streams, ahead, threads):
            ticks[0] += times[streams]

    monkeypatch.setattr(ceiling, "_library", Slow())
    ceiling.probe_all()
    assert ceiling.gbps == 4.0
    times[8] = 1 << 30
    ceiling.probe_all()
    assert ceiling.gbps == 4.0


def test_the_ceiling_reads_huge_pages_several_times_the_cache(native, monkeypatch):
    asked = []
    monkeypatch.setattr(native, "huge_pages", lambda address, size: asked.append((address, size)))
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 48 << 20)
    ceiling = measure.ReadCeiling(1, rounds=0)
    assert ceiling._memory.nbytes == measure.CEILING_CACHES * (48 << 20)
    ((address, size),) = asked
    assert address <= ceiling._memory.data_ptr() < ceiling._memory.data_ptr() + ceiling._memory.nbytes <= address + size


def test_weights_that_fit_the_cache_are_told_from_those_that_do_not(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 32 << 20)
    assert measure.fits_cache((32 << 20) + 1) is None
    assert measure.fits_cache(3 << 19) == "n/a: the weights, 1.5 MiB, fit into the last-level cache of 32 MiB"


@pytest.mark.parametrize("pattern", [*measure.PATTERNS, (3, 0)])
def test_the_read_kernel_reads_everything(native, pattern):
    for num_floats in (0, 128, 128 * 7, 1 << 16):
        memory = torch.ones(num_floats)
        for threads in (1, 2):
            assert native.read(memory.data_ptr(), num_floats, *pattern, threads) == num_floats


def test_torch_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()

    def fail() -> None:
        with measure.torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
