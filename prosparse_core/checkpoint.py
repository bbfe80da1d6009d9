"""Checkpoints inside a stage: written beside, synced, renamed; the newest whole one is where a stage goes on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prosparse_core.progress import Progress

PREFIX = "step-"
STATE = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint of ``step``: everything the next step depends on."""

    step: int
    folder: Path


def save(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any] | None = None
) -> Checkpoint:
    """Write the checkpoint of a finished step, then drop the older ones; atomic. ``extra``: further plain values.

    A process that dies in the middle leaves the checkpoint before untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{PREFIX}{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "num_threads": torch.get_num_threads(),
        "extra": extra or {},
    }
    with open(temporary / STATE, "wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, final)
    for path in root.iterdir():
        if path != final:
            shutil.rmtree(path)
    return Checkpoint(step, final)


def latest(root: Path) -> Checkpoint | None:
    """The newest finished checkpoint; leftovers of a dead writer are ignored."""
    steps = sorted(p for p in root.glob(f"{PREFIX}*") if (p / STATE).is_file()) if root.is_dir() else []
    return Checkpoint(int(steps[-1].name.removeprefix(PREFIX)), steps[-1]) if steps else None


def restore(
    root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, device: str = "cpu"
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into model and optimizer.

    Returns:
        The last finished step, or 0 when there is none, and the ``extra`` that was saved with it. An unreadable
        checkpoint is dropped, aloud: the stage then starts at its beginning, which costs time but changes no result.
    """
    found = latest(root)
    if found is None:
        return 0, {}
    try:
        state: dict[str, Any] = torch.load(found.folder / STATE, map_location=device, weights_only=True)
    except Exception as error:
        progress.note(f"checkpoint {found.folder} is not readable ({error}); starting the stage anew")
        shutil.rmtree(found.folder)
        return 0, {}
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    if state["num_threads"] != torch.get_num_threads():
        progress.note(
            f"the checkpoint was written with {state['num_threads']} threads, this run has {torch.get_num_threads()}: "
            "sums may round differently, so the weights will not be bitwise those of an uninterrupted run"
        )
    progress.note(f"resuming after step {found.step}")
    return found.step, state["extra"]
