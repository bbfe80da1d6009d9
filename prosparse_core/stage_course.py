"""The course of a stage: from its newest checkpoint step by step to the end; saved, watched, and back where it must."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core import checkpoint, monitor
from prosparse_core.checkpoint_pace import Clock
from prosparse_core.errors import ProSparseError
from prosparse_core.guard import BROKEN, Event, Events, Guard, Verdict
from prosparse_core.progress import Progress
from prosparse_core.recipe_runtime import Runtime
from prosparse_core.schedule import first_step, l1_lambda
from prosparse_core.steering import Steering
from prosparse_core.tracking import Tracker
from prosparse_core.training_log import CHECKPOINT_LOG, CHECKPOINTS, LOG, StepMetrics, cut_log

if TYPE_CHECKING:
    from prosparse_core.mixing import Batch
    from prosparse_core.training import Loop


@dataclass
class StageCourse:
    """A stage from its newest checkpoint to its end, and again from an older one where a step was too bad."""

    loop: Loop
    folder: Path
    runtime: Runtime
    progress: Progress
    lambda_before: float
    identity: Mapping[str, str] | None
    saver: checkpoint.Writer
    clock: Clock
    eyes: Eyes
    events: Events
    tracking: Path | None

    def __post_init__(self) -> None:
        train, index = self.loop.train, self.loop.index
        self.first, self.last = first_step(train.stages, index), train.stages[index].until_step
        self.checkpoints = self.folder / CHECKPOINTS
        self.began = time.monotonic()
        self.waited_s, self.num_saved, self.saved_step = 0.0, 0, 0

    def run(self) -> None:
        while self._goes_back():
            self.saver.wait()
            self.loop.mixture.rewind()
            self.loop.ranks.gather(None)  # no process reads a stream before it is prepared anew
        self.saver.wait()
        self._note_written()
        if self.num_saved:
            elapsed = time.monotonic() - self.began
            self.progress.note(
                f"training waited {self.waited_s:.1f} s for {self.num_saved} checkpoints: "
                f"{self.waited_s / elapsed:.1%} of the time"
            )

    def _resume(self) -> tuple[int, dict[str, Any]]:
        """The first step to take, and what the checkpoint tells beside weights."""
        ranks = self.loop.ranks
        if ranks.is_first:
            for old in checkpoint.checkpoints(self.checkpoints):
                if self.events.passed(old.step):
                    shutil.rmtree(old.folder)
        done, extra = checkpoint.restore(
            self.checkpoints,
            self.loop.model,
            self.loop.optimizer,
            self.progress,
            ranks=ranks,
            identity=self.identity,
        )
        return max(self.first, done + 1), extra

    def _goes_back(self) -> bool:
        """Train to the end of the stage; or only to a step that has to be rolled back."""
        loop, train, ranks, progress = self.loop, self.loop.train, self.loop.ranks, self.progress
        regularizer, target = loop.regularizer, train.stages[loop.index].target_sparsity
        start, extra = self._resume()
        guard = Guard(train, extra.get("guard"))
        steering = None
        if target is not None:
            before = extra.get("steering")
            length = self.last - self.first + 1
            steering = Steering(**before) if before else Steering(target, length, l1_lambda=self.lambda_before)
        if train.rolls_back and not extra:
            self._save(self.first - 1, guard, steering)
        self.events.forget_from(start)
        log_path = self.folder / LOG if ranks.is_first else Path(os.devnull)
        cut_log(log_path, before=start)
        self.eyes.forget_from(start)
        loop.model.train()
        if start <= self.last:
            loop.settle(start)
        if start <= self.last and steering is None:
            regularizer.l1_lambda = l1_lambda(train.stages, self.last)
            progress.note(
                f"lambda at the end {regularizer.l1_lambda:g}: per element of x1 "
                f"{regularizer.element_coefficient(train.tokens_per_step):.3g}"
            )
        folder = self.tracking if ranks.is_first else None
        with open(log_path, "a", encoding="utf-8") as log, Tracker(folder, start) as tracker:
            for step in range(start, self.last + 1):
                regularizer.l1_lambda = steering.l1_lambda if steering else l1_lambda(train.stages, step)
                if self.events.passed(step):
                    metrics, verdict = loop.passed(step), None
                else:
                    metrics, verdict = loop.step(step, guard)
                taken = metrics.skipped is None
                if steering and taken:
                    steering.update(metrics.sparsity, metrics.lm_loss, metrics.l1, metrics.lr)
                log.write(json.dumps(asdict(metrics)) + "\n")
                log.flush()
                seen = self.eyes.look(step, progress)
                self._tell(step, metrics, seen, tracker)
                if verdict and self._judged(step, metrics, verdict):
                    return True
                by_steps = self.runtime.checkpoint_every_steps and step % self.runtime.checkpoint_every_steps == 0
                if step < self.last and not self.events.passed(step) and (by_steps or self._is_due(step)):
                    self._save(step, guard, steering)
                self._note_written()
        if steering:
            progress.note(
                f"lambda was steered to {steering.l1_lambda:.4g} for {steering.target:.1%} sparsity: per element of x1 "
                f"{regularizer.element_coefficient(train.tokens_per_step):.3g}"
            )
        return False

    def _is_due(self, step: int) -> bool:
        due = self.saver.is_free and self.clock.is_due() and step - self.saved_step >= self.loop.train.rollback_reach
        return bool(self.loop.ranks.from_first(due))

    def _save(self, step: int, guard: Guard, steering: Steering | None) -> None:
        self.saver.save(step, {"guard": guard.state(), "steering": steering.state() if steering else None})
        self.clock.saved()
        self.saved_step = step

    def _note_written(self) -> None:
        """What finished checkpoints cost decides when the next one is due, and is kept beside the log."""
        for one in self.saver.take_written():
            self.clock.measured(one.blocking_s, one.write_s)
            self.waited_s, self.num_saved = self.waited_s + one.blocking_s, self.num_saved + 1
            if self.loop.ranks.is_first:
                with open(self.folder / CHECKPOINT_LOG, "a", encoding="utf-8") as log:
                    log.write(json.dumps({"stage": self.loop.index, **asdict(one)}) + "\n")

    def _judged(self, step: int, metrics: StepMetrics, verdict: Verdict) -> bool:
        """Record a bad step; whether to go back.

        Raises:
            ProSparseError: the recipe says to fail, or there were too many.
        """
        index, train = self.loop.index, self.loop.train
        what = f"stage {index}, step {step}: {verdict.reason}"
        back = max(self.first, step - train.rollback_steps) if verdict.action == "rollback" else None
        self.events.add(
            Event(index, step, verdict.action, verdict.reason, metrics.lm_loss, metrics.grad_norm, first_step=back)
        )
        if verdict.action == "fail":
            raise ProSparseError(what, hint="lower train.lr or the stage's l1")
        row, number = self.events.in_a_row(step), self.events.num_bad
        if row >= BROKEN or number > train.max_bad_steps:
            many = f"{row} in a row" if row >= BROKEN else f"{number} in this stage (train.max_bad_steps)"
            raise ProSparseError(f"{what}: bad steps, {many}", hint="lower train.lr or the stage's l1")
        did = {"skip": "skipped", "ignore": "taken all the same"}.get(
            verdict.action, f"steps {back}-{step} are taken back"
        )
        self.progress.note(f"step {step}: {verdict.reason}: {did}")
        return back is not None

    def _tell(self, step: int, metrics: StepMetrics, seen: tuple[float, float] | None, tracker: Tracker) -> None:
        held_out = {} if seen is None else {"held_out_ppl": seen[0], "held_out_sparsity": seen[1]}
        self.progress.update(
            step - self.first + 1,
            self.last - self.first + 1,
            step=step,
            **{"lambda": metrics.l1_lambda},
            lm_loss=metrics.lm_loss,
            l1=metrics.l1,
            sparsity=metrics.sparsity,
            tokens_per_s=metrics.tokens_per_s,
            **held_out,
        )
        told = ("lm_loss", "l1", "l1_term", "l1_lambda", "lr", "sparsity", "grad_norm", "tokens_per_s", "distill")
        if metrics.skipped is None:
            tracker.scalars(step, {f"train/{name}": getattr(metrics, name) for name in told})
        tracker.scalars(step, self.eyes.scalars(step))


class Eyes:
    """When a stage looks at held-out text, and what it saw last."""

    def __init__(self, loop: Loop, runtime: Runtime, folder: Path, held_out: Mapping[str, Batch]) -> None:
        tokens = sum(batch.tokens.numel() for batch in held_out.values())
        every = runtime.monitor_every
        self._every = monitor.every(loop.train, tokens, loop.ranks.size) if every is None else every
        self._every = self._every if held_out else 0
        self._path, self._is_first = folder / monitor.LOG, loop.ranks.is_first
        self._last: tuple[int, list[monitor.HeldOut]] = (0, [])
        self._monitor = monitor.Monitor(
            loop.model,
            loop.regularizer,
            held_out,
            stage=loop.index,
            precision=loop.precision,
            batch_size=loop.batch_size,
            path=self._path,
            ranks=loop.ranks,
        )

    def forget_from(self, step: int) -> None:
        self._last = (0, [])
        if self._is_first:
            cut_log(self._path, before=step)

    def look(self, step: int, progress: Progress) -> tuple[float, float] | None:
        """(perplexity, sparsity) over all corpora as last seen; None before the first look."""
        if self._every and step % self._every == 0:
            self._last = (step, self._monitor.look(step))
            perplexity, sparsity = monitor.overall(self._last[1])
            progress.note(f"step {step}: held-out perplexity {perplexity:.4g}, sparsity {sparsity:.1%}")
        return monitor.overall(self._last[1]) if self._last[1] else None

    def scalars(self, step: int) -> dict[str, float]:
        """What was seen after this very step."""
        if step != self._last[0]:
            return {}
        found = {f"held_out/{one.corpus}/perplexity": math.exp(min(one.lm_loss, 700.0)) for one in self._last[1]}
        return found | {f"held_out/{one.corpus}/sparsity": one.sparsity for one in self._last[1]}
