"""The training of one stage as a job: paths and plain values, which any process can take up; and the doing of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prosparse_core import monitor
from prosparse_core.checkpoint import load_optimizer, whole_optimizer
from prosparse_core.determinism import deterministic
from prosparse_core.distributed.parallel import compile_layers, read_shards, shard, weights, whole
from prosparse_core.distributed.ranks import ALONE, Ranks, code_digest
from prosparse_core.document_masks import is_proven, require_apart
from prosparse_core.errors import ProSparseError
from prosparse_core.families import require_family
from prosparse_core.mixing import Mixture
from prosparse_core.precision import Precision
from prosparse_core.progress import Progress
from prosparse_core.recipe_runtime import Runtime
from prosparse_core.recipe_train import Train
from prosparse_core.store import RECORD, canonical_json, read_record, same_size, sha256_text, write_json
from prosparse_core.substitute import use_activation
from prosparse_core.training import freeze, make_optimizer, train_stage
from prosparse_core.training_log import CHECKPOINTS, last_lambda
from prosparse_core.variants import MODEL, OPTIMIZER, empty_model, load_model, load_tokenizer


@dataclass(frozen=True)
class StageJob:
    """Everything that decides a stage, and where it runs. Folders of artifacts hold their records."""

    label: str
    folder: Path
    """The work folder; receives ``model/``, the optimizer's state and the log."""
    before: Path
    """The artifact of the dense model, or of the stage before."""
    corpora: Path
    teacher: Path | None
    train: Train
    index: int
    seed: int
    precision: Precision
    device: str
    runtime: Runtime
    attend_across: bool = False
    """``data.attend_across_documents``."""
    tracking: Path | None = None
    """Where TensorBoard's event files go."""

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {"train": self.train.model_dump(mode="json"), "runtime": self.runtime.model_dump(mode="json")}
        write_json(path, {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()})

    @classmethod
    def read(cls, path: Path) -> StageJob:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        plain |= {"train": Train.model_validate(plain["train"]), "runtime": Runtime.model_validate(plain["runtime"])}
        plain |= {key: Path(plain[key]) for key in ("folder", "before", "corpora")}
        plain |= {key: None if plain[key] is None else Path(plain[key]) for key in ("teacher", "tracking")}
        return cls(**plain)

    @property
    def identity(self) -> dict[str, str]:
        """By digest, what this process sees: the stage's part of the recipe, the model, the data.

        Raises:
            ProSparseError: an artifact is not there, or a file of it is not as long as it was written.
        """
        part = {"index": self.index, "seed": self.seed, "precision": self.precision, "train": self.train.model_dump()}
        part["attend_across"] = self.attend_across
        return {
            "recipe": sha256_text(canonical_json(part)),
            "model": _digest(self.before),
            "data": _digest(self.corpora),
        }


def _digest(folder: Path) -> str:
    record = read_record(folder)
    damaged = next((f["path"] for f in record["files"] if not same_size(folder, f)), None)
    if damaged:
        raise ProSparseError(
            f"{folder / damaged} is not what {RECORD} says", hint="every node needs the same $PROSPARSE_HOME, whole"
        )
    return str(record["digest"])


def num_threads(runtime: Runtime) -> int | None:
    """CPU threads of a process; None: as many as torch takes by itself."""
    if runtime.threads or not runtime.is_launched:
        return runtime.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (runtime.processes or 1))


def run_stage(job: StageJob, progress: Progress, ranks: Ranks = ALONE) -> None:
    """Train a stage and write what its artifact holds; alike in one process and in several, all of which must call.

    Raises:
        BadInput: the processes do not see the same recipe, model, data and code.
    """
    if threads := num_threads(job.runtime):
        torch.set_num_threads(threads)
    identity = job.identity
    if ranks.size > 1:
        ranks.agree({**identity, "code": code_digest()})
    model = _load(job, job.before / MODEL, ranks, trained=True)
    teacher = None if job.teacher is None else _load(job, job.teacher / MODEL, ranks, trained=False)
    if not job.attend_across and not is_proven(model.config, require_family(model.config, where="model")):
        require_apart(model)
    optimizer = make_optimizer(model, job.train)
    if job.index > 0:
        state = torch.load(job.before / OPTIMIZER, map_location=job.device, mmap=ranks.size > 1, weights_only=True)
        load_optimizer(optimizer, state)
    if job.runtime.compile:
        progress.note("the layers are compiled in their first passes, which takes a minute or so")
        compile_layers(model)
    if job.runtime.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    corpora = Mixture(
        job.corpora,
        job.seed,
        job.folder,
        stages=job.train.stages[: job.index + 1],
        attend_across=job.attend_across,
        prepares=ranks.is_first,
        processes=job.runtime.data_processes,
    )
    with deterministic(job.runtime.deterministic), contextlib.closing(corpora) as mixture:
        train_stage(
            model,
            optimizer,
            mixture,
            job.train,
            job.index,
            job.folder,
            precision=job.precision,
            runtime=job.runtime,
            progress=progress,
            teacher=teacher,
            lambda_before=last_lambda(job.before),
            ranks=ranks,
            identity=identity,
            held_out=monitor.windows(mixture) if job.runtime.monitor_every != 0 else None,
            tracking=job.tracking,
        )
    progress.note("writing the stage's weights and optimizer state")
    _write(job, model, optimizer, ranks)


def _load(job: StageJob, folder: Path, ranks: Ranks, *, trained: bool) -> Any:
    """The model on its device, sharded where the runtime says so; the one to train has its activation and freezes."""
    sharded = ranks.size > 1 and job.runtime.parallel == "fsdp"
    model = empty_model(folder) if sharded else load_model(folder, job.device)[0]
    if trained:
        use_activation(model, job.train.activation, job.train.shift)
        freeze(model, job.train)
    if sharded:
        shard(model, job.precision)
        read_shards(model, folder)
        _move_buffers(model, job.device)
    return model


def _move_buffers(model: nn.Module, device: str) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _write(job: StageJob, model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """``model/`` and the optimizer's state, the same files whatever the number of processes; rank 0 writes."""
    state = optimizer.state_dict()
    if ranks.size > 1:  # neither a sharded nor a wrapped model is what transformers saves
        full = {name: whole(tensor, ranks) for name, tensor in weights(model).items()}
        state = whole_optimizer(optimizer, ranks)
        if not ranks.is_first:
            return
        model = empty_model(job.before / MODEL)
        use_activation(model, job.train.activation, job.train.shift)
        model.load_state_dict(full, strict=False, assign=True)  # tied weights are there once
        model.tie_weights()
        assert not any(p.is_meta for p in model.parameters())
    model.save_pretrained(job.folder / MODEL)
    load_tokenizer(job.before / MODEL).save_pretrained(job.folder / MODEL)
    torch.save(state, job.folder / OPTIMIZER)
    shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)
