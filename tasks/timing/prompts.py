"""The prompts that decoding is timed after: of which lengths, of what text, and why one of a length is not there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

LONG = 128
"""Tokens from which on a prompt is dear: one is read, once for all ways to decode."""
MEMORY_SHARE = 0.5
"""Of the free memory, what keys and values may take."""


@dataclass
class Prompts:
    """Prompts ``[1, n]`` of exactly n tokens by n, the shortest first; and why there are none of the other lengths."""

    by_length: dict[int, list[Tensor]] = field(default_factory=dict)
    absent: dict[int, str] = field(default_factory=dict)

    def drop(self, length: int, why: str) -> None:
        """There is a reason not to decode after prompts of that length."""
        del self.by_length[length]
        self.absent[length] = why


def choose_prompts(windows: Sequence[tuple[str, Tensor]], lengths: Sequence[int], positions: int) -> Prompts:
    """Prompts from windows (corpus, tokens ``[1, n]``) of held-out text, for a model of so many positions.

    One of the beginning of each corpus, of a long one only the first. Windows of a corpus, and where none is long
    enough all of them, are put one after another: such a prompt walks over documents.
    """
    import torch

    texts: dict[str, list[Tensor]] = {}
    for corpus, tokens in windows:
        texts.setdefault(corpus, []).append(tokens)
    whole = [torch.cat(parts, dim=1) for parts in texts.values()]
    together = torch.cat(whole, dim=1)
    found = Prompts()
    for n in lengths:
        long_enough = [text for text in whole if text.shape[1] >= n] or [together]
        if positions <= n:
            found.absent[n] = f"the model has {positions} positions: a prompt of {n} tokens leaves none to decode"
        elif long_enough[0].shape[1] < n:
            found.absent[n] = f"the held-out text has {together.shape[1]} tokens: too few for a prompt of {n}"
        else:
            found.by_length[n] = [text[:, :n] for text in long_enough[: 1 if n >= LONG else None]]
    return found


def drop_dear(prompts: Prompts, model: nn.Module, budget_s: float, cache_bytes: int) -> None:
    """Leave out the long prompts whose reading would take the whole budget, or whose caches the free memory.

    Args:
        cache_bytes: keys and values of one position, over all that is kept at a time.
    """
    import psutil

    long = [n for n in prompts.by_length if n >= LONG]
    a_token = _seconds_of_a_token(model, prompts.by_length[long[0]][0]) if long else 0.0
    free = psutil.virtual_memory().available
    for n in long:
        seconds, num_bytes = n * a_token, n * cache_bytes
        if seconds > budget_s:
            prompts.drop(n, f"reading a prompt of {n} tokens would take about {seconds:.0f} s of budget_s={budget_s:g}")
        elif num_bytes > MEMORY_SHARE * free:
            sizes = f"{num_bytes / 2**30:.1f} of {free / 2**30:.1f} GiB of memory"
            prompts.drop(n, f"keys and values of {n} tokens take {sizes}")


def _seconds_of_a_token(model: nn.Module, prompt: Tensor, tokens: int = 32) -> float:
    """Of a forward pass of a few: an upper estimate for many, whose matrix products are better."""
    import torch

    best = float("inf")
    with torch.inference_mode():
        for _ in range(2):
            began = time.monotonic()
            model(input_ids=prompt[:, :tokens])
            best = min(best, time.monotonic() - began)
    return best / min(tokens, prompt.shape[1])
