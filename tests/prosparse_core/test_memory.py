"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prosparse_core.memory import keep_freed_memory

KEPT_MB = """
import ctypes, sys
from prosparse_core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = resident_mb()
blocks = [libc.malloc(24 << 20) for _ in range(5)]
for block in blocks:
    libc.memset(block, 1, 24 << 20)
for block in blocks:
    libc.free(block)
print(resident_mb() - before)
"""


def kept_mb(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", KEPT_MB, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_is_freed_stays() -> None:
    assert kept_mb("as it comes") < 60
    assert kept_mb("keep") > 110


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
