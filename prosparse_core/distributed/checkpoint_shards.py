"""The files of a checkpoint: each process writes its share in the background, by torch.distributed.checkpoint (DCP).

Folder layout::

    .metadata, __RANK_0.distcp    DCP's: every tensor under a flat name; model.NAME, optimizer.INDEX.KEY, and the random
                                  generators' states, rng.RANK and rng_cuda.RANK
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
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prosparse_core.distributed.parallel import weights
from prosparse_core.distributed.ranks import Ranks
from prosparse_core.errors import ProSparseError
from prosparse_core.store import write_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PROGRESS = "progress.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def begin(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    group: ProcessGroup | None,
) -> Future[Any]:
    """Copy this process's share into its memory, and begin to write the copy. Every process must call.

    Under FSDP the share is its shard; of tensors that all hold whole (DDP), every process takes some.

    Args:
        group: the processes' connection for checkpoints alone; None for a process alone.
    """
    from torch.distributed import checkpoint

    # DCP's remark on every save of a process alone; filters are of the whole process, and its thread warns later.
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    tensors = _mine(_tensors(model, optimizer), ranks)
    for name, state in rng_state().items():
        tensors[f"{name}.{ranks.rank}"] = state
    found = checkpoint.async_save(tensors, storage_writer=_writer(folder), process_group=group, no_dist=ranks.size == 1)
    assert isinstance(found, Future)  # as the copy was made at once
    return found


def finish(
    writing: Future[Any], folder: Path, state: Mapping[str, Any], ranks: Ranks, group: ProcessGroup | None
) -> int:
    """Wait for every shard, hash them, then (rank 0) write ``state``. Every process must call, and gets the same error.

    Returns:
        The bytes of all files.

    Raises:
        OSError: the disk of one is full.
        ProSparseError: a shard could not be written for another reason.
    """
    with _ordinary_errors():
        writing.result()
    mine: list[dict[str, Any]] | Exception
    try:
        mine = [_describe(p) for p in sorted(folder.iterdir()) if _belongs(p, ranks)]
    except Exception as failure:
        mine = failure
    files = []
    for found in ranks.gather(mine, group):
        if isinstance(found, Exception):
            raise found
        files += found
    error = None
    if ranks.is_first:
        try:
            write_json(folder / PROGRESS, {**state, "files": files})
        except Exception as failure:
            error = failure
    if (error := ranks.gather(error, group)[0]) is not None:
        raise error
    return sum(entry["bytes"] for entry in files)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights(model).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    return tensors


def _mine(tensors: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What this process writes: its shards, and of the tensors that all hold whole about as many bytes as the others.

    Otherwise every process would copy the whole model before DCP decides who writes what.
    """
    held = [0] * ranks.size
    mine = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            mine[name] = tensor
            continue
        rank = held.index(min(held))
        held[rank] += tensor.nbytes
        if rank == ranks.rank:
            mine[name] = tensor
    return mine


def num_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of a checkpoint, from the second step on: weights, and two moments of what is trained."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(t.nbytes for t in weights(model).values()) + 2 * sum(p.nbytes for p in trained)


def rng_state() -> dict[str, Tensor]:
    """The state of every random generator a step may use: the CPU's, and this process's GPU's where it has one."""
    states = {"rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng_cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Undo what was drawn since :func:`rng_state`."""
    if "rng" in states:
        torch.set_rng_state(states["rng"])
    if "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"])


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
) -> dict[str, Tensor]:
    """Load model and optimizer in place; every process must call. Returns its random states, where there are any."""
    from torch.distributed import checkpoint

    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights(model).items()}
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
    rng = {name: held for name, held in rng_state().items() if f"{name}.{ranks.rank}" in there}
    tensors |= {f"{name}.{ranks.rank}": held for name, held in rng.items()}
    with _ordinary_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(tensors, storage_reader=_reader(folder), no_dist=ranks.size == 1)
    optimizer.load_state_dict(moments)
    return rng


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(folder)
