"""A checkpoint that several processes write together, each its shard, by torch.distributed.checkpoint (DCP).

Folder layout::

    .metadata, __RANK_0.distcp    DCP's: every tensor under a flat name; model.NAME, optimizer.INDEX.KEY, rng.RANK
    progress.json                 the plain values, and sha256 and size of every file above; rank 0 writes it last

DCP reads any part of a tensor from any shard, so that the number of processes may change between two runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core.distributed.parallel import weights
from prosparse_core.distributed.ranks import Ranks
from prosparse_core.errors import ProSparseError
from prosparse_core.store import write_json

PROGRESS = "progress.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write(
    folder: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Write every process's shard, then (rank 0) ``state``. Every process must call, and gets the same error.

    Raises:
        OSError: the disk of one is full.
        ProSparseError: a shard could not be written for another reason.
    """
    from torch.distributed import checkpoint

    writer = _writer(folder)
    tensors = {f"model.{name}": tensor for name, tensor in weights(model).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    tensors[f"rng.{ranks.rank}"] = torch.get_rng_state()
    with _ordinary_errors():
        checkpoint.save(tensors, storage_writer=writer)
    mine = [p for p in sorted(folder.iterdir()) if _belongs(p, ranks)]
    files = [entry for entries in ranks.gather([_describe(p) for p in mine]) for entry in entries]
    error = None
    if ranks.is_first:
        try:
            write_json(folder / PROGRESS, {**state, "files": files})
        except OSError as failure:
            error = failure
    if (error := ranks.from_first(error)) is not None:
        raise error


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemWriter

    class Writer(FileSystemWriter):
        """Tells of a full disk as what it is: the reasons an error has do not travel between processes."""

        def write_data(self, *arguments: Any) -> Any:
            try:
                return super().write_data(*arguments)
            except Exception as error:
                if is_disk_full(error):
                    raise OSError(errno.ENOSPC, f"No space left for {folder}") from None
                raise

    return Writer(folder)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk; torch's writers hide it under errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """DCP's summary of what went wrong in each process is no ``Exception``: raise the first of these instead."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as summary:
        rank, (error, _) = min(summary.failures.items())
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, f"rank {rank}: {error}") from None
        raise ProSparseError(f"rank {rank}: {type(error).__name__}: {error}") from summary


def is_there(folder: Path) -> bool:
    return (folder / PROGRESS).is_file()


def _belongs(path: Path, ranks: Ranks) -> bool:
    """Whether this process hashes a file: its own shards; rank 0 also the metadata."""
    return path.name.startswith(f"__{ranks.rank}_") or (ranks.is_first and path.name == ".metadata")


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def read_plain(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The plain values, after every file was compared with its hash; each process compares its share.

    Raises:
        ProSparseError: a file is missing or has changed.
    """
    state: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    for entry in state["files"][ranks.rank :: ranks.size]:
        path = folder / entry["name"]
        if not path.is_file() or _describe(path) != entry:
            raise ProSparseError(f"{path.name} is missing or not what was written")
    return state


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in a checkpoint."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {n.removeprefix("model."): tuple(m.size) for n, m in found.items() if n.startswith("model.")}


def read(
    folder: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Tensor | None:
    """Load model and optimizer in place; every process must call. Returns its random state, if there is one."""
    from torch.distributed import checkpoint

    tensors = {f"model.{name}": tensor for name, tensor in weights(model).items()}
    there = set(_reader(folder).read_metadata().state_dict_metadata)
    moments = optimizer.state_dict()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moments["state"] = {
        index: {"step": torch.zeros(()), **{key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}}
        for index, p in enumerate(trained)
        if f"optimizer.{index}.step" in there
    }
    for index, values in moments["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    rng = torch.get_rng_state() if ranks.rank < state["processes"] else None
    if rng is not None:
        tensors[f"rng.{ranks.rank}"] = rng
    with _ordinary_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(tensors, storage_reader=_reader(folder), no_dist=ranks.size == 1)
    optimizer.load_state_dict(moments)
    return rng


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(folder)
