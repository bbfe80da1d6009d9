"""Time any checkpoint without training: kernels on its own masks, its predictors, decoding; or a shape alone."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from prefect import flow

from flows.run import home_folder, open_run
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Recipe, Speed
from tasks.evaluation.checkpoint import checkpoint
from tasks.mixture import mixture
from tasks.speed import speed
from tasks.step import Run
from tasks.timing.synthetic import Synthetic, parse_synthetic, speed_synthetic
from tasks.timing.target import NO_TRAINING, OWN_DATA, BenchTarget, find_bench_target


@dataclasses.dataclass(frozen=True)
class Request:
    """What to time, and how; every argument of the verb and of the flow."""

    model: str | None = None
    """None: the newest run's ``prosparse`` variant."""
    shape: str | None = None
    """d_model x d_ff of a layer of random weights, instead of a model."""
    dtype: str | None = None
    """Of that layer: fp32 (default), bf16 or fp16."""
    sparsity: float | None = None
    """Of its random masks; of a model, the share of gates to which thresholds are raised for timing. Default: 0.89."""
    threads: int | None = None
    budget_s: float | None = None
    trust_remote_code: bool = False
    """Run the code that comes with the model."""


def prepare(request: Request) -> tuple[Recipe, BenchTarget | Synthetic]:
    """The recipe a request comes to and what it names, checked before anything is read or written.

    Raises:
        BadInput: an unknown model, a malformed shape, options that do not go together.
    """
    found: BenchTarget | Synthetic
    if request.shape is not None:
        if request.model is not None:
            raise BadInput(f"both a model ({request.model}) and --shape {request.shape}", hint="give one of them")
        sparsity = 0.89 if request.sparsity is None else request.sparsity
        found = parse_synthetic(request.shape, request.dtype or "fp32", sparsity)
        raw = {
            "name": f"bench-{found.name}",
            "description": f"time a layer of {found.name} with random weights and masks",
            "model": {"id": found.name, "source": "random:llama"},
            "data": OWN_DATA,
            "train": NO_TRAINING,
        }
        recipe = recipes.parse(raw)
    else:
        if request.dtype is not None:
            raise BadInput(f"--dtype {request.dtype}: a model is timed in float32 and in 16 bits", hint="drop --dtype")
        found = find_bench_target(request.model, home_folder(), trust_remote_code=request.trust_remote_code)
        recipe = found.recipe
    changes: dict[str, Any] = {"threads": request.threads, "budget_s": request.budget_s}
    if request.shape is None and request.sparsity is not None:
        changes["raised_sparsity"] = request.sparsity
    given = {k: v for k, v in changes.items() if v is not None}
    wrong = [f"{k}={v}" for k, v in given.items() if not v > 0 or (k == "raised_sparsity" and v >= 1)]
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: more than 0, and a sparsity below 1")
    section = Speed.model_validate({**recipe.speed.model_dump(), **given})
    return recipe.model_copy(update={"speed": section}), found


def measure(run: Run, found: BenchTarget | Synthetic) -> None:
    """One speed step of one checkpoint, on the text of its own run where it has one."""
    if isinstance(found, Synthetic):
        speed_synthetic(run, found)
        return
    variant = checkpoint(run, found.target)
    corpora = found.corpora or mixture(run, variant.checkpoint)
    original = found.original or (variant if variant.activation == "original" else None)
    speed(run, variant, corpora, original=original, predictors=found.predictors)


@flow(name="speed", flow_run_name="{model}", persist_result=False)
def variant(
    model: str | None = None,
    shape: str | None = None,
    dtype: str | None = None,
    sparsity: float | None = None,
    threads: int | None = None,
    budget_s: float | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Time a checkpoint, ours or not: kernels on its own masks, its predictors, decoding; or a shape alone.

    Args:
        model: a folder, an exported model, a hub id, a variant of the ledger by id or setting, or an artifact's digest;
            default: the ``prosparse`` variant of the newest run.
        shape: instead of a model, a layer of random weights, such as ``4096x11008``.
        dtype: of that layer: fp32, bf16 or fp16.
        sparsity: of its masks (default 0.89); of a model, the share of dead gates that decoding is also timed at.
        threads: of every kernel; one thread is timed by the CPU time of the process, several by the wall clock.
        budget_s: seconds for timing.
        trust_remote_code: run the code that comes with the model, for an architecture that transformers lacks.

    Returns:
        The run id under which the ledger keeps it.
    """
    request = Request(model, shape, dtype, sparsity, threads, budget_s, trust_remote_code)
    return run_request(request, prefect=True)


def run_request(request: Request, *, prefect: bool) -> str:
    """Carry a request out, recorded in the ledger like any run; returns its id. Times are taken anew every time."""
    loaded, found = prepare(request)
    with open_run(loaded, flow="speed", force=["speed"], prefect=prefect) as run:
        measure(run, found)
    return run.run_id


def from_command_line(arguments: argparse.Namespace) -> str:
    """What the verb ``bench`` asks for, with Prefect or without; returns the run's id."""
    request = Request(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Request)})
    if arguments.inline:
        return run_request(request, prefect=False)
    prepare(request)
    from prefect import tags

    from flows import service

    with tags(service.process_tag()):  # lets `recover` tell whether the process of a run still lives
        return variant(**dataclasses.asdict(request))
