"""The processes that train one stage together: who this one is, what they add up, what they must agree on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, ProSparseError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


PATIENCE = timedelta(hours=12)
"""How long one process waits for another to write its shard of a checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together; alone, every method is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup | None:
        """All of them; None for a process alone."""
        if self.size == 1:
            return None
        from torch import distributed

        return distributed.group.WORLD

    def share(self, num: int) -> slice:
        """This process's part of ``num`` rows of which every process has equally many."""
        assert num % self.size == 0, f"{num} rows cannot be shared by {self.size} processes"
        each = num // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sums(self, *values: float) -> list[float]:
        """Each value added up over all processes, which must all call."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        found = torch.tensor(values, dtype=torch.float64, device=_device_of_collectives())
        distributed.all_reduce(found)
        return found.tolist()

    def side_group(self) -> ProcessGroup | None:
        """All of them once more, to talk on the CPU while the main group trains; None for a process alone.

        Two threads must never use one group: what they exchange could meet in another order in every process.
        """
        if self.size == 1:
            return None
        from torch import distributed

        return distributed.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: Any, group: ProcessGroup | None = None) -> list[Any]:
        """What every process calls this with, by rank; over ``group`` instead of the main one."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=group)
        return found

    def from_first(self, value: Any) -> Any:
        """What rank 0 calls this with."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on unless every process sees the same, by digest.

        Raises:
            BadInput: in every process alike; names each rank that differs from rank 0, and in what.
        """
        first, *others = self.gather(dict(facts))
        lines = [
            f"rank {rank} has another {name} than rank 0: {theirs.get(name, 'none')[:16]}, not {digest[:16]}"
            for rank, theirs in enumerate(others, start=1)
            for name, digest in first.items()
            if theirs.get(name) != digest
        ]
        if lines:
            raise BadInput(
                "the training processes do not see the same:\n" + "\n".join(f"  - {line}" for line in lines),
                hint="every node needs the same version of the code and the same $PROSPARSE_HOME",
            )


ALONE = Ranks()


@contextlib.contextmanager
def joined(world_size: int, device: str) -> Iterator[Ranks]:
    """Meet the other processes, as ``torch.distributed.run`` put them into the environment.

    Raises:
        ProSparseError: there are not as many processes as the recipe asks for.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise ProSparseError(f"{started} training processes were started, the recipe asks for {world_size}")
    if world_size == 1:
        yield ALONE
        return
    import torch
    from torch import distributed

    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # one machine: its own name may lead to no address, or to a slow one
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    assert distributed.get_world_size() == world_size
    yield Ranks(distributed.get_rank(), world_size)
    distributed.destroy_process_group()  # not after an error: the others may be gone, and it would wait for them


def _device_of_collectives() -> str:
    from torch import distributed

    return "cuda" if "nccl" in str(distributed.get_backend()) else "cpu"


def code_digest() -> str:
    """The version of the code that trains: this package, torch and transformers."""
    import torch
    import transformers

    hasher = hashlib.sha256(f"torch {torch.__version__} transformers {transformers.__version__}".encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        hasher.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return hasher.hexdigest()
