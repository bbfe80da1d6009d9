"""A stage of a few steps in this process, whose losses can be spoilt: what tests of its course share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny

from prosparse_core import training
from prosparse_core.mixing import Batch
from prosparse_core.progress import Silent
from prosparse_core.recipe import Runtime
from prosparse_core.recipe_train import Stage, Train
from prosparse_core.substitute import use_relu
from prosparse_core.training_log import LOG

STEPS = 12
TIMING = {"tokens_per_s", "wall_s"}


class Interrupted(Exception):
    pass


class Notes(Silent):
    """Progress that remembers its notes, and does something after one step, such as breaking off."""

    def __init__(self, step: int | None = None, then: Callable[[], None] | None = None) -> None:
        self.notes: list[str] = []
        self._step, self._then = step, then

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        if fields["step"] == self._step:
            if self._then:
                self._then()
            raise Interrupted


class SpoiltMixture:
    """Batches seeded by the step; ``factors`` multiply the loss of some steps, once :meth:`spoil` has been called."""

    seq_len = 16

    def __init__(self, factors: dict[int, float] | None = None) -> None:
        self.factors = factors or {}
        self.step = 0

    def batch(self, step: int, sequences: int) -> Batch:
        self.step = step
        tokens = torch.randint(3, 96, (sequences, 16), generator=torch.Generator().manual_seed(step))
        return Batch(tokens=tokens, labels=tokens.clone(), corpora=[0] * sequences)

    def rewind(self) -> None:
        pass

    def spoil(self, patch: pytest.MonkeyPatch) -> SpoiltMixture:
        loss = training.next_token_loss
        patch.setattr(training, "next_token_loss", lambda *a: loss(*a) * self.factors.get(self.step, 1.0))
        return self


def held_out() -> dict[str, Batch]:
    """Windows of two corpora to look at; those of one hold two documents each."""
    found = {}
    for seed, name in ((101, "code"), (102, "prose")):
        batch = SpoiltMixture().batch(seed, 3)
        labels = batch.labels.clone()
        labels[:, : 5 * (seed - 100)] = -100
        positions = torch.arange(16).remainder(9).expand(3, 16) if name == "prose" else None
        found[name] = Batch(batch.tokens, labels, batch.corpora, positions)
    return found


def recipe(**changes: Any) -> Train:
    stages = [Stage(until_step=1, l1=0), Stage(until_step=STEPS, l1=0.5)]
    return Train(**{"tokens_per_step": 64, "lr": 3e-3, "stages": stages, **changes})


def train(
    folder: Path,
    mixture: Any = None,
    progress: Any = None,
    held_out: Any = None,
    dropout: float = 0.0,
    tracking: Path | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """(the weights, what the log says of each step) after stage 1, or where it broke off.

    ``options`` that a runtime knows are its own, the others those of ``train``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runtime = {key: options.pop(key) for key in list(options) if key in Runtime.model_fields}
    train_ = recipe(**options)
    model = tiny(attention_dropout=dropout)
    use_relu(model)
    with contextlib.suppress(Interrupted):
        training.train_stage(
            model,
            training.make_optimizer(model, train_),
            mixture or SpoiltMixture(),
            train_,
            1,
            folder,
            precision="fp32",
            runtime=Runtime(**runtime),
            progress=progress or Silent(),
            held_out=held_out,
            tracking=tracking,
        )
    return {k: v.clone() for k, v in model.state_dict().items()}, lines(folder / LOG)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
