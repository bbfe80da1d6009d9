"""The choice of the next token from its logits: the largest, or drawn at a temperature from the likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw: logits / temperature, then the ``top_k`` largest, then the fewest that hold ``top_p`` of the
    probability. None leaves a cut out. Equal seeds draw equal tokens. ValueError for values that mean nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}: a positive number (for greedy decoding, no sampling)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: above 0 and at most 1, or None")

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[V]`` -> ``[V]``: what each token is drawn with."""
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            least = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = scores.sort()
            cut = ascending.softmax(0).cumsum(0) <= 1 - self.top_p
            cut[-1] = False  # the likeliest always stays
            scores[order[cut]] = -math.inf
        return scores.softmax(0)

    def generator(self) -> torch.Generator:
        """A fresh source of randomness for one sequence."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator))
