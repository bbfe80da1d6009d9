"""Keep freed memory in the process: tensors come and go many times a second, and new pages are dear.

glibc gives freed memory back to the system, blocks of some size at once and the top of its heap in between, and the
system clears every page anew when the next one is asked for. A training step of SmolLM2-135M on two cores took 370,000
page faults, a tenth of its time.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
KEPT_BYTES = 32 << 20
"""Blocks up to this size stay, which is all that glibc allows. Larger ones would leave gaps that nothing else fits."""


def keep_freed_memory() -> bool:
    """Let malloc of this process keep what is freed for the next allocation; no result changes.

    Returns:
        Whether this C library can (glibc does); elsewhere nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _MOST))
