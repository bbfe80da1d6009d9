"""Closed-loop lambda: steer the factor until a wanted share of x1 is zero, instead of picking the factor by hand.

A factor means something else for every model, reduction and learning rate (method: paper App. L; the multiplicative
rule: ReMoE, BlockFFN, arXiv 2507.08771). Here the measured sparsity follows a course: a quarter of a sine from where
the stage begins to the target, steep at first and reached well before the end (while the learning rate can still move
anything), then flat. The logarithm of lambda rises evenly until L1 itself begins to fall, and is then moved by a
proportional and an integral part of the distance from that course: the rule is indifferent to the scale of lambda.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

COURSE = 0.55
"""Share of the stage's steps after which the course has reached the target."""
START_SHARE = 0.0003
"""The first factor makes lambda * L1 this share of the next-token loss: too little to do harm to any model."""
FIRST_RISE = math.log(1.5)
"""Change of log lambda in every step until L1 has fallen by ``ANSWER``: what a factor does to one model it does to
another at a thousand times its size, and a short stage has no time to find that out slowly."""
ANSWER = 0.07
PROPORTIONAL = 60.0
"""Change of log lambda per unit of sparsity: falling a point behind the course raises lambda by 80 %."""
INTEGRAL = 400.0
"""The same per stage: a point behind during a whole stage would raise log lambda by 4."""
SMOOTHING = 60
"""The measured sparsity is smoothed over this fraction of the stage (at least 4 steps)."""
LARGEST_RISE, LARGEST_FALL = math.log(1.25), math.log(3.0)
"""Change of log lambda in one step at most: what died under too large a factor comes back slowly, so it falls fast."""
SMALLEST_SHARE = 1e-3
LARGEST_SHARE = 3.0
"""lambda * L1 is at most this many times the next-token loss: a target that wants more is out of reach in the steps
given, and would only ruin the model."""


@dataclass
class Steering:
    """The controller of one stage. Its fields are all of its state: plain numbers, kept in checkpoints.

    ``l1_lambda`` is the factor of the coming step; :meth:`update` takes what that step measured.
    """

    target: float
    """Share of zeros in x1, 0 to 1."""
    num_steps: int
    """Steps of the stage."""
    l1_lambda: float = 0.0
    steps_done: int = 0
    start: float = 0.0
    """Sparsity at the beginning of the stage."""
    smoothed: float = 0.0
    error: float = 0.0
    first_l1: float = 0.0
    smoothed_l1: float = 0.0
    answered: bool = False
    """L1 has begun to fall: lambda is large enough to do something."""
    largest: float = 0.0
    """The largest factor so far: lambda stays above a small share of it, so that it finds back from a fall."""

    def course(self, step: int) -> float:
        """Where sparsity should be after ``step`` steps."""
        share = min(1.0, step / max(1.0, COURSE * self.num_steps))
        return self.start + (self.target - self.start) * math.sin(math.pi / 2 * share)

    def update(self, sparsity: float, lm_loss: float, l1: float) -> None:
        """Learn from a finished step: the sparsity of its batch, its loss in nats and its reduced |x1|."""
        self.steps_done += 1
        if self.steps_done == 1:
            self.start = self.smoothed = sparsity
            self.first_l1 = self.smoothed_l1 = l1
            self.answered = self.l1_lambda > 0
            self.l1_lambda = self.l1_lambda or START_SHARE * lm_loss / max(l1, 1e-12)
            return
        window = max(4.0, self.num_steps / SMOOTHING)
        self.smoothed += (sparsity - self.smoothed) / min(window, self.steps_done)
        self.smoothed_l1 += (l1 - self.smoothed_l1) / min(4.0, self.steps_done)
        self.answered |= self.smoothed_l1 < (1 - ANSWER) * self.first_l1 or self.smoothed > self.target
        error = self.course(self.steps_done) - self.smoothed
        move = PROPORTIONAL * (error - self.error) + INTEGRAL / self.num_steps * error
        move = max(-LARGEST_FALL, min(LARGEST_RISE, move)) if self.answered else FIRST_RISE
        self.l1_lambda *= math.exp(move)
        self.l1_lambda = min(self.l1_lambda, LARGEST_SHARE * lm_loss / max(l1, 1e-12))
        self.largest = max(self.largest, self.l1_lambda)
        self.l1_lambda = max(self.l1_lambda, SMALLEST_SHARE * self.largest)
        self.error = error

    def state(self) -> dict[str, Any]:
        return asdict(self)
