"""The part of a recipe that says where and how it runs; no result depends on it beyond rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prosparse_core.recipe_train import Section


class Runtime(Section):
    """Where and how it runs: outside the identity of every result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of a process; default: the machine's cores, shared among its training processes."""
    data_processes: int | None = Field(default=None, gt=0)
    """Processes that tokenize the mixture, or, beside training, what it streams; default: the machine's cores, at most
    16, and none that has less than 4 M tokens to do. 1: the flow tokenizes itself."""
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    """Also save after every so many steps, whatever it costs."""
    checkpoint_overhead: float = Field(default=0.02, gt=0, lt=1)
    """Share of the time that checkpoints may take. The interval follows from what the one before was measured to cost:
    the copy, for which training waits, and, where the same cores train, the writing in the background."""
    checkpoint_every_minutes: float | None = Field(default=None, gt=0)
    """This interval instead."""
    monitor_every: int | None = Field(default=None, ge=0)
    """Steps between two looks at held-out perplexity and sparsity while a stage trains; 0: none. Default: as often as
    costs about a hundredth of the computing, at most a hundred times in all stages together."""
    deterministic: bool = False
    """Only deterministic algorithms on a GPU (torch.use_deterministic_algorithms), so that a resumed run can end in the
    same bits there too; slower, and an operation that has none is an error. A CPU needs no such thing."""
    tracking: Literal["tensorboard"] | None = None
    """Also write the training curves as TensorBoard event files, to ``$PROSPARSE_HOME/tensorboard/RECIPE/STAGE``."""
    processes: int | None = Field(default=None, gt=0)
    """Training processes on each node, started by torch.distributed.run; None: the flow trains in its own process."""
    nodes: int = Field(default=1, gt=0)
    """Machines that train together: each runs the same command, on the same ``$PROSPARSE_HOME``."""
    node_rank: int | None = Field(default=None, ge=0)
    """Which of them this is, from 0; default: what Slurm, Kubernetes or torchrun put into the environment."""
    rendezvous: str | None = Field(default=None, pattern=r"^[^\s:]+:\d+$")
    """``host:port`` of node 0; default: from the environment likewise."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: weights, gradients and moments are sharded over all processes."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in backward: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each layer: fewer launches and passes over memory on a GPU, at the price of compiling in every
    process that trains a stage. Needs a C++ compiler. Sums may round otherwise than uncompiled."""
    keep: Literal["last", "all"] = "all"
    """The optimizer's state, two thirds of a stage's bytes. all: every stage keeps it, so that any later stage can be
    changed and retrained alone. last: it is dropped once no stage of the run goes on from it; a changed stage then
    trains the stages before it again. Weights, logs and measurements are kept either way."""

    @property
    def world_size(self) -> int:
        """Training processes on all nodes together."""
        return (self.processes or 1) * self.nodes

    @property
    def is_launched(self) -> bool:
        """Whether training runs in processes of its own, beside the flow's."""
        return self.processes is not None or self.nodes > 1


def check_world(runtime: Runtime, sequences: int) -> None:
    """Every process takes an equal share of each step's ``sequences``.

    Raises:
        ValueError: they cannot be shared equally; names the nearest numbers of processes that can.
    """
    world = runtime.world_size
    if sequences % world:
        fitting = [n for n in range(1, sequences + 1) if sequences % n == 0]
        below = max(n for n in fitting if n < world)
        near = [below, *(n for n in fitting if n > world)][:2]
        raise ValueError(
            f"runtime.processes={runtime.processes or 1} on runtime.nodes={runtime.nodes} are {world} training "
            f"processes, which do not divide the {sequences} sequences of a step (train.tokens_per_step / "
            f"data.seq_len); the nearest that do: {' or '.join(map(str, near))}"
        )
    if runtime.node_rank is not None and runtime.node_rank >= runtime.nodes:
        raise ValueError(f"runtime.node_rank={runtime.node_rank} of runtime.nodes={runtime.nodes}: they count from 0")
