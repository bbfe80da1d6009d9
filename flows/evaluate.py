"""Measure any checkpoint without training: the paper's benchmarks, and on request a recipe's held-out corpora."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import yaml
from prefect import flow

from flows.run import home_folder, open_run
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Evaluate, Model, Recipe
from tasks import preflight
from tasks.base_model import base_model
from tasks.evaluate import evaluate
from tasks.evaluation.benchmarks import PAPER, plan_benchmarks
from tasks.evaluation.checkpoint import Target, checkpoint, find_checkpoint
from tasks.mixture import mixture
from tasks.step import Run


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and how; every argument of the verb and of the flow."""

    model: str
    tasks: list[str] | None = None
    """Benchmarks, groups or tasks of lm-eval; None: the recipe's, or without a recipe the paper's."""
    datasets: str | None = None
    limit: int | None = None
    run_code: bool = False
    recipe: str | None = None
    """Whose held-out corpora to measure perplexity and sparsity on as well."""
    batch_size: int | None = None
    precision: str | None = None
    trust_remote_code: bool = False
    """Run the code that comes with the model."""
    force: bool = False


class Measured(Recipe):
    """A recipe of the sections that measuring needs: nothing is mixed or trained."""

    def to_yaml(self) -> str:
        kept = {"name", "description", "model", "evaluate", "runtime"}
        return yaml.safe_dump(self.model_dump(mode="json", include=kept), sort_keys=False, allow_unicode=True)


def prepare(request: Request) -> tuple[Recipe, Target]:
    """The recipe a request comes to and the checkpoint it names, checked before anything is read or written.

    Raises:
        BadInput: an unknown model, benchmark or recipe; see :mod:`tasks.evaluation`, its checkpoint and benchmarks.
    """
    target = find_checkpoint(request.model, home_folder(), trust_remote_code=request.trust_remote_code)
    base = recipes.load(request.recipe) if request.recipe else None
    if base is not None:
        preflight.check(base, home_folder(), "evaluate")
    section = base.evaluate if base else Evaluate(benchmarks=[PAPER])
    given: dict[str, Any] = {
        "benchmarks": request.tasks,
        "datasets": request.datasets,
        "limit": request.limit,
        "run_code": request.run_code or None,
        "batch_size": request.batch_size,
    }
    changes = {**section.model_dump(), **{k: v for k, v in given.items() if v is not None}}
    for key in ("limit", "batch_size"):
        if changes[key] is not None and changes[key] < 1:
            raise BadInput(f"{key}={changes[key]}: at least 1")
    section = Evaluate.model_validate(changes)
    plan_benchmarks(section)
    precision = request.precision or (base.model.precision if base else "auto")
    if precision not in ("auto", "fp32", "bf16"):
        raise BadInput(f"precision={precision!r}: auto, fp32 or bf16")
    if base is None and not section.benchmarks:
        raise BadInput("nothing to measure: no benchmarks and no recipe", hint="--tasks paper, or --recipe NAME")
    if base is not None:
        model = base.model.model_copy(update={"precision": precision})
        return base.model_copy(update={"evaluate": section, "model": model}), target
    model = target.model.model_copy(update={"precision": precision})
    description = f"measure {request.model}"
    return Measured.model_construct(name="evaluate", description=description, model=model, evaluate=section), target


def measure(run: Run, target: Target, *, with_corpora: bool) -> None:
    """One evaluate step of one checkpoint."""
    variant = checkpoint(run, target)
    corpora = mixture(run, base_model(run)) if with_corpora else None
    # The mixture is the recipe's and was made with its model; what is measured goes by its own name.
    named = Model(**{**run.recipe.model.model_dump(exclude={"id", "shape"}), "id": target.model.id})
    evaluate(dataclasses.replace(run, recipe=run.recipe.model_copy(update={"model": named})), variant, corpora)


@flow(name="evaluate", flow_run_name="{model}", persist_result=False)
def variant(
    model: str,
    tasks: list[str] | None = None,
    datasets: str | None = None,
    limit: int | None = None,
    run_code: bool = False,
    recipe: str | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
) -> str:
    """Measure a checkpoint, ours or not, without training.

    Args:
        model: a folder, an exported model, a hub id, a variant of the ledger by id or setting, or an artifact's digest.
        tasks: benchmarks (``piqa``), groups (``commonsense``, ``paper``) or tasks of lm-eval; default: ``paper``.
        datasets: a folder laid out like the hub to take their data from; default: the hub.
        limit: at most this many documents per task; marks the rows as partial.
        run_code: allow HumanEval and MBPP to execute what the model wrote, in a subprocess with limits.
        recipe: also measure perplexity and sparsity on this recipe's held-out corpora; its model and its mixture are
            prepared for it, as far as the store has them not.
        batch_size: sequences per forward pass; default: the recipe's, or 4.
        precision: auto, fp32 or bf16.
        trust_remote_code: run the code that comes with the model, for an architecture that transformers lacks.
        force: measure again though the store has it.

    Returns:
        The run id under which the ledger keeps it.
    """
    request = Request(model, tasks, datasets, limit, run_code, recipe, batch_size, precision, trust_remote_code, force)
    return run_request(request, prefect=True)


def run_request(request: Request, *, prefect: bool) -> str:
    """Carry a request out, recorded in the ledger like any run; returns its id."""
    loaded, target = prepare(request)
    force = ["evaluate"] if request.force else []
    with open_run(loaded, flow="evaluate", force=force, prefect=prefect) as run:
        measure(run, target, with_corpora=request.recipe is not None)
    return run.run_id


def from_command_line(arguments: argparse.Namespace) -> str:
    """What the verb ``evaluate`` asks for, with Prefect or without; returns the run's id."""
    names = [f.name for f in dataclasses.fields(Request) if f.name != "tasks"]
    tasks = None if arguments.tasks is None else [t.strip() for t in arguments.tasks.split(",") if t.strip()]
    request = Request(tasks=tasks, **{name: getattr(arguments, name) for name in names})
    if arguments.inline:
        return run_request(request, prefect=False)
    prepare(request)
    from prefect import tags

    from flows import service

    with tags(service.process_tag()):  # lets `recover` tell whether the process of a run still lives
        return variant(**dataclasses.asdict(request))
