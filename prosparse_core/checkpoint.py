"""Checkpoints inside a stage: written beside, synced, renamed; the newest whole one is where a stage goes on.

One process writes one file; several write a shard each (:mod:`prosparse_core.distributed.checkpoint_shards`). Either is
read by any number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core.distributed import checkpoint_shards
from prosparse_core.distributed.parallel import part_of, weights, whole
from prosparse_core.distributed.ranks import ALONE, Ranks
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.progress import Progress

PREFIX = "step-"
STATE = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint of ``step``: everything the next step depends on."""

    step: int
    folder: Path


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any] | None = None,
    *,
    ranks: Ranks = ALONE,
    identity: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write the checkpoint of a finished step, then drop the older ones; atomic. Every process must call.

    A process that dies in the middle leaves the checkpoint before untouched.

    Args:
        extra: further plain values.
        identity: what the checkpoint belongs to, by digest; :func:`restore` refuses another.

    Raises:
        EnvironmentProblem: in every process, when the disk of one is full.
    """
    final = root / f"{PREFIX}{step:08d}"
    temporary = root / f".{final.name}.{ranks.from_first(os.getpid())}.tmp"
    if ranks.is_first:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    state = {"step": step, **_circumstances(ranks), "identity": dict(identity or {}), "extra": extra or {}}
    try:
        if ranks.size == 1:
            _write_one(temporary / STATE, {**state, **_tensors(model, optimizer)})
        else:
            checkpoint_shards.write(temporary, state, model, optimizer, ranks)
    except Exception as error:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if checkpoint_shards.is_disk_full(error):
            raise EnvironmentProblem(
                f"the disk of {root} is full: the checkpoint of step {step} cannot be written",
                hint="free some space and run the same command again: it goes on from the checkpoint before",
            ) from error
        raise
    if ranks.is_first:
        os.replace(temporary, final)
        for path in root.iterdir():
            if path != final:
                shutil.rmtree(path)
    return Checkpoint(step, final)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}


def _write_one(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())


def latest(root: Path) -> Checkpoint | None:
    """The newest finished checkpoint; leftovers of a dead writer are ignored."""
    steps = sorted(p for p in root.glob(f"{PREFIX}*") if _is_whole(p)) if root.is_dir() else []
    return Checkpoint(int(steps[-1].name.removeprefix(PREFIX)), steps[-1]) if steps else None


def _is_whole(folder: Path) -> bool:
    return (folder / STATE).is_file() or checkpoint_shards.is_there(folder)


def restore(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    device: str = "cpu",
    *,
    ranks: Ranks = ALONE,
    identity: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into model and optimizer. Every process must call.

    Returns:
        The last finished step, or 0 when there is none, and the ``extra`` that was saved with it. An unreadable
        checkpoint is dropped, aloud: the stage then starts at its beginning, which costs time but changes no result.

    Raises:
        BadInput: the checkpoint belongs to another model, other data or another recipe.
    """
    found: Checkpoint | None = ranks.from_first(latest(root) if ranks.is_first else None)
    if found is None:
        return 0, {}
    is_one = (found.folder / STATE).is_file()
    state: dict[str, Any] = {}
    problem = None
    try:
        state = _read_one(found.folder, device, ranks) if is_one else checkpoint_shards.read_plain(found.folder, ranks)
    except Exception as error:
        problem = f"{error}"
    if problems := [p for p in ranks.gather(problem) if p]:
        progress.note(f"checkpoint {found.folder} is not readable ({problems[0]}); starting the stage anew")
        if ranks.is_first:
            shutil.rmtree(found.folder)
        return 0, {}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(model).items()}
    theirs = (
        {n: tuple(t.shape) for n, t in state["model"].items()} if is_one else checkpoint_shards.shapes(found.folder)
    )
    _require_same(found.folder, state["identity"], identity or {}, theirs, shapes)
    if is_one:
        load_weights(model, state["model"])
        load_optimizer(optimizer, state["optimizer"])
        rng = state["rng"].cpu() if ranks.is_first else None
    else:
        rng = checkpoint_shards.read(found.folder, state, model, optimizer, ranks)
    if rng is not None:
        torch.set_rng_state(rng)
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


def _read_one(folder: Path, device: str, ranks: Ranks) -> dict[str, Any]:
    # several processes of one machine share the pages of the file instead of holding a copy each
    return torch.load(folder / STATE, map_location=device, mmap=ranks.size > 1, weights_only=True)


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


def load_weights(model: nn.Module, full: Mapping[str, Tensor]) -> None:
    """Give a model, sharded or not, weights that this process holds whole."""
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(part_of(full[name], tensor))


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
