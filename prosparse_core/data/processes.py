"""How many processes tokenize, and how fast one does."""

from __future__ import annotations

import os

TOKENS_PER_CPU_S = 239_000
"""Of reading, tokenizing and packing, measured on text and code: what ``prosparse plan`` rests on."""
TOKENS_PER_PROCESS = 4_000_000
"""A process more is worth its start for so many: a quarter of a minute of work."""
MOST_PROCESSES = 16
"""Taken by default: reading and packing, in one process, keep about so many busy."""


def num_processes(asked: int | None, num_tokens: int, cores: int | None = None) -> int:
    """How many processes prepare ``num_tokens``: as many as asked, else the cores, but none that is not worth it.

    Args:
        cores: default: this machine's, as far as this process may use them.
    """
    if asked:
        return asked
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, min(cores, MOST_PROCESSES, num_tokens // TOKENS_PER_PROCESS))
