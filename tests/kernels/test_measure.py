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
def test_the_read_bandwidth_is_a_plausible_number(native, threads):
    assert 0.1 < measure.read_bandwidth_gbps(threads, num_bytes=16 << 20, repeats=2) < 2000


def test_the_read_kernel_reads_everything(native):
    for num_floats in (0, 128, 1 << 16):
        memory = torch.ones(num_floats)
        for threads in (1, 2):
            assert native.read(memory.data_ptr(), num_floats, threads) == num_floats


def test_torch_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()

    def fail() -> None:
        with measure.torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
