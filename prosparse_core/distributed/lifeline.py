"""A process that ends with the one that started it, however that one ends: no orphans after ``kill -9``."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL_S = 0.5


def end_with_parent(parent: int) -> None:
    """Be killed when process ``parent``, which started this one, dies; at once if it is dead already.

    On Linux the kernel sends the signal, when the *thread* that started this process ends: whoever starts one waits
    for it in the same thread. Elsewhere a thread looks every half second.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before the kernel knew whom to tell
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
