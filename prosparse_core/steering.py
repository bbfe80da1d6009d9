"""Closed-loop lambda: steer the factor until a wanted share of x1 is zero, instead of picking the factor by hand.

A factor means something else for every model, reduction and learning rate (method: paper App. L; the multiplicative
rule: ReMoE, BlockFFN, arXiv 2507.08771). Here the measured sparsity follows a course from where the stage begins to the
target: most of the way along a quarter of a sine while the learning rate can still move the model, the rest slowly to
the end. The logarithm of lambda rises evenly until L1 itself begins to fall, and is then moved by a proportional and an
integral part of the distance from that course: the rule is indifferent to the scale of lambda.

Sparsity answers lambda ten to twenty steps late (Adam's momentum), and hardly falls again: a neuron that is zero at
every token gets no gradient. So the gains are small, the course comes from below and never waits at the target, and a
sparsity above it lowers lambda faster than one below raises it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

COURSE = 0.6
"""Fraction of the stage's steps after which the quarter of a sine ends."""
CREEP = 0.2
"""Fraction of the way to the target that is covered evenly, over all steps."""
START_SHARE = 0.0003
"""The first factor makes lambda * L1 this share of the next-token loss: too little to do harm to any model."""
FIRST_RISE = math.log(1.5)
"""Change of log lambda in every step until L1 has fallen by ``ANSWER``: what a factor does to one model it does to
another at a thousand times its size, and a short stage has no time to find that out slowly."""
ANSWER = 0.07
SETBACK = 3 * FIRST_RISE
"""Log lambda falls by this when L1 has answered: the answer is as late as some of these rises."""
PROPORTIONAL = 45.0
"""Change of log lambda per unit of sparsity: falling a point behind the course raises lambda by 57 %."""
INTEGRAL = 220.0
"""The same per stage: a point behind during a whole stage would raise log lambda by 2.2."""
COOLING, LARGEST_COOLING = 0.5, 5.0
"""A smaller learning rate makes the same lambda do less: the integral grows with the largest rate of the stage over the
present one, to this power, and at most so many times."""
ABOVE = 3.0
"""How many times as much a sparsity above the limit counts in the integral: it hardly falls again."""
ROOM = 0.25
"""The limit is this fraction of what is left from the course to the target below the target."""
SMOOTHING = 60
"""The measured sparsity is smoothed over this fraction of the stage (at least ``SHORTEST`` steps)."""
SHORTEST = 4.0
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
    largest_lr: float = 0.0
    """Of the steps so far."""
    largest: float = 0.0
    """The largest factor so far: lambda stays above a small share of it, so that it finds back from a fall."""

    def course(self, step: int) -> float:
        """Where sparsity should be after ``step`` steps."""
        done = step / self.num_steps
        share = (1 - CREEP) * math.sin(math.pi / 2 * min(1.0, done / COURSE)) + CREEP * done
        return self.start + (self.target - self.start) * share

    def update(self, sparsity: float, lm_loss: float, l1: float, lr: float) -> None:
        """Learn from a finished step: sparsity of its batch, loss in nats, reduced |x1|, learning rate."""
        self.largest_lr = max(self.largest_lr, lr)
        self.steps_done += 1
        if self.steps_done == 1:
            self.start = self.smoothed = sparsity
            self.first_l1 = self.smoothed_l1 = l1
            self.answered = self.l1_lambda > 0
            self.l1_lambda = self.l1_lambda or START_SHARE * lm_loss / max(l1, 1e-12)
            return
        window = max(SHORTEST, self.num_steps / SMOOTHING)
        self.smoothed += (sparsity - self.smoothed) / min(window, self.steps_done)
        self.smoothed_l1 += (l1 - self.smoothed_l1) / min(4.0, self.steps_done)
        waited = not self.answered
        self.answered |= self.smoothed_l1 < (1 - ANSWER) * self.first_l1 or self.smoothed > self.target
        error = self.course(self.steps_done) - self.smoothed
        if not self.answered:
            move = FIRST_RISE
        elif waited:
            move = -SETBACK
        else:
            weaker = min(LARGEST_COOLING, (self.largest_lr / max(lr, 1e-12)) ** COOLING)
            integral = weaker * INTEGRAL / self.num_steps
            move = PROPORTIONAL * (error - self.error) + integral * self._behind(error)
            move = max(-LARGEST_FALL, min(LARGEST_RISE, move))
        self.l1_lambda *= math.exp(move)
        self.l1_lambda = min(self.l1_lambda, LARGEST_SHARE * lm_loss / max(l1, 1e-12))
        self.largest = max(self.largest, self.l1_lambda)
        self.l1_lambda = max(self.l1_lambda, SMALLEST_SHARE * self.largest)
        self.error = error

    def _behind(self, error: float) -> float:
        """What the integral sums up: how far sparsity is behind the course (negative: how far above its limit).

        Once the sine has ended, a sparsity between the course and a limit little below the target is where it should
        be: lambda need not fall for it, only to be too small in the end.
        """
        creeps = self.steps_done > COURSE * self.num_steps
        limit = self.target - (ROOM * (self.target - self.course(self.steps_done)) if creeps else 0.0)
        if self.smoothed > limit:
            return ABOVE * (limit - self.smoothed)
        return max(0.0, error) if creeps else error

    def state(self) -> dict[str, Any]:
        return asdict(self)
