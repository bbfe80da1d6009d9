"""Checkpoints inside a stage: copied at once, written in the background, renamed; the newest whole one is resumed.

Every process writes a part, one alone all of it (:mod:`prosparse_core.distributed.checkpoint_shards`). What they wrote
is read by any number of processes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core.distributed import checkpoint_shards
from prosparse_core.distributed.parallel import part_of, weights, whole
from prosparse_core.distributed.ranks import ALONE, Ranks
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.progress import Progress

PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint of ``step``: everything the next step depends on."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Written:
    """What a checkpoint cost."""

    step: int
    bytes: int
    blocking_s: float
    """The loop waited this long, while what is to be written was copied (and for the checkpoint before)."""
    write_s: float
    """Writing and hashing in the background, from the copy to the rename."""


class Writer:
    """Writes the checkpoints of a stage while it goes on, one at a time; every process must make and use one alike.

    Args:
        root: the folder of all checkpoints.
        identity: what they belong to, by digest; :func:`restore` refuses another.
        reach: how many steps before the present one a rollback may lead: of the checkpoints that old the newest is kept
            beside the newest of all.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: Ranks = ALONE,
        identity: Mapping[str, str] | None = None,
        reach: int = 0,
    ) -> None:
        self._root, self._model, self._optimizer, self._ranks = root, model, optimizer, ranks
        self._identity, self._reach = dict(identity or {}), reach
        self._group = ranks.side_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Written] | None = None
        self._written: list[Written] = []

    @property
    def is_free(self) -> bool:
        """Whether nothing is being written, as this process sees it."""
        return self._pending is None or self._pending.done()

    def take_written(self) -> list[Written]:
        """The checkpoints that became whole since the last call."""
        if self._pending is not None and self._pending.done() and self._pending.exception() is None:
            self.wait()
        found, self._written = self._written, []
        return found

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Copy the state after ``step`` and begin to write it; older checkpoints go when it is whole.

        Returns when training may go on. A process that dies later leaves the checkpoint before untouched.

        Args:
            extra: further plain values, as JSON can hold them.

        Raises:
            EnvironmentProblem: in every process, when the disk of one was full for the checkpoint before.
        """
        began = time.perf_counter()
        self.wait()
        ranks = self._ranks
        final = self._root / f"{PREFIX}{step:08d}"
        temporary = self._root / f".{final.name}.{os.getpid()}.tmp"
        if ranks.is_first:
            self._root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        temporary = ranks.from_first(temporary)
        state = {"step": step, **_circumstances(ranks), "identity": self._identity, "extra": extra or {}}
        writing = checkpoint_shards.begin(temporary, self._model, self._optimizer, ranks, self._group)
        blocking = time.perf_counter() - began
        self._pending = self._thread.submit(self._finish, writing, state, temporary, final, blocking)

    def _finish(
        self, writing: Future[Any], state: dict[str, Any], temporary: Path, final: Path, blocking_s: float
    ) -> Written:
        """In the background, in every process."""
        began, ranks = time.perf_counter(), self._ranks
        try:
            size = checkpoint_shards.finish(writing, temporary, state, ranks, self._group)
        except Exception as error:
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            if checkpoint_shards.is_disk_full(error):
                raise EnvironmentProblem(
                    f"the disk of {self._root} is full: the checkpoint of step {state['step']} cannot be written",
                    hint="free some space and run the same command again: it goes on from the checkpoint before",
                ) from error
            raise
        failed = None
        if ranks.is_first:
            try:
                self._put(temporary, final)
            except OSError as failure:
                failed = failure
        if (failed := ranks.gather(failed, self._group)[0]) is not None:
            raise failed
        return Written(state["step"], size, blocking_s, time.perf_counter() - began)

    def _put(self, temporary: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)  # of an earlier try, which could not be read
        os.replace(temporary, final)
        kept = {f"{PREFIX}{step:08d}" for step in needed([c.step for c in checkpoints(self._root)], self._reach)}
        for path in self._root.iterdir():
            if path.name not in kept:
                shutil.rmtree(path)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            EnvironmentProblem: as :meth:`save`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._written.append(pending.result())

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pending = self._pending
        try:
            if kind is None:
                self.wait()
            elif pending is not None:
                pending.exception()  # a whole checkpoint is worth the wait; the error at hand is what is told
        finally:
            self._thread.shutdown(wait=False)


def needed(steps: Sequence[int], reach: int) -> list[int]:
    """Which checkpoints are kept: the newest one that is ``reach`` steps older than the newest, and all after it."""
    oldest = max((s for s in steps if s <= max(steps) - reach), default=0)
    return sorted(s for s in steps if s >= oldest)


def checkpoints(root: Path) -> list[Checkpoint]:
    """All finished checkpoints, oldest first; leftovers of a dead writer are none."""
    found = sorted(p for p in root.glob(f"{PREFIX}*") if checkpoint_shards.is_there(p)) if root.is_dir() else []
    return [Checkpoint(int(p.name.removeprefix(PREFIX)), p) for p in found]


def latest(root: Path) -> Checkpoint | None:
    """The newest finished checkpoint."""
    found = checkpoints(root)
    return found[-1] if found else None


def restore(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    ranks: Ranks = ALONE,
    identity: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into model and optimizer. Every process must call.

    Returns:
        The last finished step, or 0 when there is none, and the ``extra`` that was saved with it. An unreadable
        checkpoint is dropped, aloud: the stage then goes on from the one before, or starts at its beginning, which
        costs time but changes no result.

    Raises:
        BadInput: the checkpoint belongs to another model, other data or another recipe.
    """
    found: Checkpoint | None = ranks.from_first(latest(root) if ranks.is_first else None)
    if found is None:
        return 0, {}
    state: dict[str, Any] = {}
    problem = None
    try:
        state = checkpoint_shards.read_plain(found.folder, ranks)
    except Exception as error:
        problem = f"{error}"
    if problems := [p for p in ranks.gather(problem) if p]:
        progress.note(f"checkpoint {found.folder} is not readable ({problems[0]}): it is dropped")
        if ranks.is_first:
            shutil.rmtree(found.folder)
        return restore(root, model, optimizer, progress, ranks=ranks, identity=identity)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(model).items()}
    _require_same(found.folder, state["identity"], identity or {}, checkpoint_shards.shapes(found.folder), shapes)
    checkpoint_shards.set_rng_state(checkpoint_shards.read(found.folder, state, model, optimizer, ranks))
    if (before := _how(state)) != (now := _how(_circumstances(ranks))):
        progress.note(
            f"the checkpoint was written with {before}, this run has {now}: "
            "sums may round differently, so the weights will not be bitwise those of an uninterrupted run"
        )
    progress.note(f"resuming after step {found.step}")
    return found.step, state["extra"]


def _circumstances(ranks: Ranks) -> dict[str, Any]:
    """What decides how sums round."""
    return {"num_threads": torch.get_num_threads(), "processes": ranks.size}


def _how(state: Mapping[str, Any]) -> str:
    processes = state["processes"]
    return f"{state['num_threads']} threads" + (f" in each of {processes} processes" if processes > 1 else "")


def _require_same(
    folder: Path,
    identity: Mapping[str, str],
    wanted: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    wanted_shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a checkpoint of something else."""
    other = [name for name, digest in wanted.items() if name in identity and identity[name] != digest]
    if wrong := next((n for n, shape in wanted_shapes.items() if shapes.get(n) != shape), None):
        shape = shapes.get(wrong)
        other.append(
            f"model ({wrong} is {list(wanted_shapes[wrong])} here, {list(shape) if shape else 'missing'} there)"
        )
    if other:
        raise BadInput(
            f"checkpoint {folder} belongs to another {', another '.join(other)}",
            hint="delete that folder: the stage then starts at its beginning",
        )


def load_optimizer(optimizer: torch.optim.Optimizer, full: dict[str, Any]) -> None:
    """Give an optimizer, of a sharded model or not, a state that this process holds whole."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            key: part_of(value, trained[index]) if isinstance(value, Tensor) and value.ndim else value
            for key, value in values.items()
        }
        for index, values in full["state"].items()
    }
    optimizer.load_state_dict({**full, "state": state})


def whole_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The optimizer's state with every tensor whole, on rank 0; every process must call."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: whole(value, ranks) if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return state
