"""A short stage, trained alone or as one of two processes: what the tests of training in several processes share.

Run as a program it is one of the processes: see test_training_parallel.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import tiny

from prosparse_core import checkpoint, monitor, training
from prosparse_core.distributed.parallel import shard
from prosparse_core.distributed.ranks import ALONE, Ranks, joined
from prosparse_core.document_masks import positions_of
from prosparse_core.errors import ProSparseError
from prosparse_core.guard import EVENTS
from prosparse_core.mixing import Batch
from prosparse_core.progress import Silent
from prosparse_core.recipe import Runtime
from prosparse_core.recipe_train import Distill, Stage, Train
from prosparse_core.substitute import use_relu
from prosparse_core.training_log import LOG

STEPS = 8
MODES = (
    "ddp",
    "ddp-halves",
    "ddp-micro-checkpointing",
    "ddp-distill",
    "fsdp",
    "fsdp-micro-checkpointing-bf16",
    "fsdp-frozen-tied",
)


class CountedMixture:
    """Batches from a generator seeded by the step; a part of the tokens has no labels, in uneven shares. All but the
    first window hold several documents, other ones in each."""

    seq_len = 16
    step = 0

    def rewind(self) -> None:
        pass

    def batch(self, step: int, sequences: int) -> Batch:
        self.step = step
        tokens = torch.randint(3, 96, (sequences, 16), generator=torch.Generator().manual_seed(step))
        labels = tokens.clone()
        labels[0, :11] = -100
        begins = torch.zeros(sequences, 16, dtype=torch.bool)
        for row in range(1, sequences):
            begins[row, [row, 15 - step % 5]] = True
        return Batch(tokens=tokens, labels=labels, corpora=[0] * sequences, positions=positions_of(begins))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Interrupted(Exception):
    pass


class StopAt(Notes):
    """Progress that breaks off after a step, as a crash would; in every process."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.stop = step

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        if fields["step"] == self.stop:
            raise Interrupted


def recipe(mode: str) -> Train:
    distill = Distill(weight=0.5) if "distill" in mode else None
    return Train(
        tokens_per_step=128,
        micro_batch=4 if "halves" in mode else 1 if "micro" in mode else None,
        lr=3e-3,
        warmup_steps=2,
        weight_decay=0.1,
        freeze=["embeddings"] if "frozen" in mode else [],
        on_non_finite="rollback" if "spoilt" in mode else "skip",
        rollback_steps=1,
        stages=[Stage(until_step=1, l1=0), Stage(until_step=STEPS, l1=2.0, distill=distill)],
    )


def model_of(mode: str, seed: int = 0, **changes: Any) -> Any:
    model = tiny(seed=seed, tie_word_embeddings="tied" in mode, **changes)
    use_relu(model)
    return model


@contextlib.contextmanager
def spoilt(mixture: CountedMixture, step: int | None) -> Iterator[None]:
    """Inside, the loss of a step is no number."""
    loss = training.next_token_loss

    def spoilt_loss(*arguments: Any) -> torch.Tensor:
        return loss(*arguments) * (float("nan") if mixture.step == step else 1.0)

    training.next_token_loss = spoilt_loss
    try:
        yield
    finally:
        training.next_token_loss = loss


def held_out() -> dict[str, Batch]:
    return {name: CountedMixture().batch(seed, 3) for seed, name in ((101, "code"), (102, "prose"))}


def train(
    folder: Path, mode: str, ranks: Ranks = ALONE, progress: Silent | None = None, model: Any = None, **runtime: Any
) -> tuple[list[dict[str, Any]], Any]:
    """(what the log says of each step, the model) of stage 1."""
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    recipe_ = recipe(mode)
    model = model or model_of(mode)
    training.freeze(model, recipe_)
    precision = "bf16" if "bf16" in mode else "fp32"
    if "checkpointing" in mode:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if ranks.size > 1 and mode.startswith("fsdp"):
        shard(model, precision)  # type: ignore[arg-type]
    mixture = CountedMixture()
    with spoilt(mixture, 6 if "spoilt" in mode else None):
        training.train_stage(
            model,
            training.make_optimizer(model, recipe_),
            mixture,  # type: ignore[arg-type]
            recipe_,
            1,
            folder,
            precision=precision,  # type: ignore[arg-type]
            runtime=Runtime(**runtime),
            progress=progress or Silent(),
            teacher=tiny(seed=7) if "distill" in mode else None,
            ranks=ranks,
            held_out=held_out(),
        )
    return lines(folder / LOG) if ranks.is_first else [], model


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupted(folder: Path, mode: str, ranks: Ranks = ALONE) -> None:
    """Save after step 4, break off after step 6."""
    try:
        train(folder, mode, ranks, StopAt(6), checkpoint_every_steps=4)
    except Interrupted:
        return
    raise AssertionError("was not interrupted")


def refused_by(call: Any) -> str:
    """The error a call ends with."""
    try:
        call()
    except ProSparseError as error:
        return f"{type(error).__name__}: {error} ({error.hint})"
    return "nothing"


def full_disk(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint while the disk of rank 1 is full, after one that was written."""
    model = model_of("fsdp")
    shard(model, "fp32")
    optimizer = training.make_optimizer(model, recipe("fsdp"))
    writer = checkpoint.Writer(folder, model, optimizer, ranks=ranks)
    writer.save(3)
    writer.wait()
    before = torch.serialization.save

    def save(value: Any, file: Any) -> None:
        before(value, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    if ranks.rank == 1:
        torch.save = save  # type: ignore[assignment]
    writer.save(6)
    said = refused_by(writer.wait)
    torch.save = before
    ranks.gather(None)
    left = sorted(p.name for p in folder.iterdir())
    return {"said": said, "left": left, "resumes": checkpoint.restore(folder, model, optimizer, Silent(), ranks=ranks)}


def other_model(folder: Path, ranks: Ranks) -> dict[str, str]:
    """A checkpoint of a wider model, and one of the same shape but another identity."""
    model = model_of("fsdp", intermediate_size=61)
    optimizer = training.make_optimizer(model, recipe("fsdp"))
    with checkpoint.Writer(folder, model, optimizer, ranks=ranks, identity={"model": "abc", "data": "d"}) as writer:
        writer.save(3)
    narrow = model_of("fsdp")
    parts = {"narrow": (narrow, {}), "named": (model, {"model": "xyz", "data": "d"})}
    return {
        name: refused_by(lambda m=m, i=i: checkpoint.restore(folder, m, optimizer, Silent(), ranks=ranks, identity=i))
        for name, (m, i) in parts.items()
    }


def main(folder: Path) -> None:
    """Everything two processes are needed for, in one go."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with joined(2, "cpu") as ranks:
        found: dict[str, Any] = {mode: train(folder / mode, mode, ranks)[0] for mode in MODES}
        for mode in ("ddp", "fsdp"):
            interrupted(folder / f"{mode}-by-2", mode, ranks)
            if ranks.is_first:
                shutil.copytree(folder / f"{mode}-by-2", folder / f"{mode}-for-1")
            ranks.gather(None)
            found[f"{mode}-by-2"] = train(folder / f"{mode}-by-2", mode, ranks)[0]
            found[f"{mode}-by-1"] = train(folder / f"{mode}-by-1", mode, ranks)[0]
            found[f"{mode}-watched"] = train(folder / f"{mode}-watched", mode, ranks, monitor_every=2)[0]
            found[f"{mode}-spoilt"] = train(folder / f"{mode}-spoilt", f"{mode}-spoilt", ranks)[0]
            found[f"{mode}-held-out"] = lines(folder / f"{mode}-watched" / monitor.LOG)
            found[f"{mode}-events"] = lines(folder / f"{mode}-spoilt" / EVENTS)
        found["digests"] = refused_by(lambda: ranks.agree({"data": f"digest {ranks.rank}", "model": "same"}))
        found["full"] = full_disk(folder / "full", ranks)
        found["other"] = other_model(folder / "other", ranks)
        (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    main(Path(sys.argv[3]))
