"""What must hold before anything expensive starts: the model is there, the data is there, the disk has room."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.build import find_compiler
from prosparse_core import settings
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.planning.cost import shape_of
from prosparse_core.planning.disk import disk
from prosparse_core.planning.hardware import find_device
from prosparse_core.precision import resolve_device
from prosparse_core.recipe import Imported, Recipe, Runtime, Source
from prosparse_core.store import require_space
from prosparse_core.tracking import require as require_tracking
from tasks import base_model
from tasks.evaluation.benchmarks import plan_benchmarks
from tasks.evaluation.checkpoint import config_of, of_source
from tasks.mixture import require_documents_apart
from tasks.model_source import check_model, on_the_hub


def check(recipe: Recipe, home: Path, flow: str = "prosparse", *, elsewhere: bool = False) -> list[str]:
    """Refuse a run that cannot end well: the one list of what ``run``, ``plan`` and ``validate`` refuse.

    Args:
        flow: which takes the recipe: prosparse its stages, compare its settings, evaluate its corpora only.
        elsewhere: it is to run on another machine: this one's disk, GPUs and compiler say nothing of it.

    Returns:
        What could not be checked, a line each: what lies on the hub, and what only the machine of the run tells.

    Raises:
        BadInput: a missing model folder or one without weights or tokenizer, a GGUF that is none, an unknown family,
            missing data files or columns, a mirror that lacks a dataset, a benchmark that is unknown or not allowed, a
            setting the recipe lacks something for, an imported folder that was not trained with ReLU as its row says,
            more training processes than GPUs, an architecture that cannot keep the documents of a window apart.
        EnvironmentProblem: a missing package or compiler, too little room in the store.
    """
    from prosparse_core.data.sources import check_source
    from prosparse_core.recipe_mixture import block_counts

    rows = settings.rows(recipe) if flow == "compare" else None
    if flow == "evaluate":
        base_model.identity(recipe.model)
        not_checked = []
    else:
        trained_with = [recipe.train.activation] if rows is None else [r.train.activation for r in rows if r.train]
        not_checked = check_model(recipe, trained_with)
        _check_documents(recipe)
    block_counts({source.name: source.weight for source in recipe.data.sources})
    for source in recipe.data.sources:
        check_source(source)
        not_checked += _unseen(source)
    planned, _ = plan_benchmarks(recipe.evaluate)
    if recipe.evaluate.datasets is None:
        not_checked += [f"evaluate.benchmarks: the data of {p.benchmark.name} on the hub" for p in planned]
    if flow == "evaluate":
        return not_checked
    if rows is None:
        settings.require_relu(recipe)
    else:
        for imported in recipe.compare.imported:
            not_checked += _check_import(imported)
    if elsewhere:
        return [*not_checked, "the machine it is to run on: its disk, GPUs and compiler"]
    _check_devices(recipe.runtime)
    _check_compiler(recipe.runtime)
    require_tracking(recipe.runtime.tracking)
    shape = shape_of(recipe.model)
    if shape is not None:
        trained = settings.training_of(rows, recipe.seed) if rows is not None else None
        stages = (trained.num_stages, trained.num_last) if trained else ()
        most = disk(recipe, shape, *stages).most[recipe.runtime.keep]
        # What an earlier attempt has left is not needed once more.
        require_space(home, max(0, most - _size(home / "store")), f"a run of {recipe.name}")
    return not_checked


def _check_documents(recipe: Recipe) -> None:
    """Documents of a window can be kept apart, as far as the model's config is here."""
    kind, _, rest = recipe.model.source.partition(":")
    folder = Path(recipe.model.source).expanduser()
    if kind == "random":
        require_documents_apart(
            recipe, base_model.with_family({**recipe.model.config, "model_type": rest}, recipe.model)
        )
    elif folder.is_dir():
        require_documents_apart(recipe, base_model.with_family(config_of(folder), recipe.model))


def is_for_another_machine(recipe: Recipe) -> bool:
    """Whether the recipe names GPUs as its hardware and there are none here."""
    device = None if recipe.hardware is None else find_device(recipe.hardware.device)
    return device is not None and device.is_gpu and resolve_device("auto") != "cuda"


def _unseen(source: Source) -> list[str]:
    """What nobody looked at, of a source of kind hub."""
    if source.kind != "hub":
        return []
    place, revision = f"data.sources.{source.name}: {source.path}", f"revision {source.revision}"
    if source.mirror is not None:
        return [f"{place}: whether its mirror is of {revision}"] if source.revision else []
    parts = [f"config {source.config}"] if source.config else []
    parts += [f"data_dir {', '.join(d for d in source.data_dirs if d)}"] if source.data_dir else []
    parts += [revision] if source.revision else []
    part = f" ({'; '.join(parts)})" if parts else ""
    return [f"{place}{part} on the hub: its files and columns"]


def _check_import(imported: Imported) -> list[str]:
    """What can be told without a hub: the rest is told when its base_model step has run, before anything is trained."""
    folder = Path(imported.source).expanduser()
    if not folder.is_dir():
        found = base_model.identity(imported.model)
        return [on_the_hub(f"compare.imported.{imported.setting}", imported.model)] if "hub" in found else []
    of_source(imported.model)
    config = config_of(folder)
    if base_model.activation_name(config) is not None:  # else transformers knows the default when it has read it
        require_relu(imported, config)
    return []


def require_relu(imported: Imported, config: Mapping[str, Any]) -> None:
    """Refuse to put ReLU into an imported checkpoint that was not trained with it.

    Raises:
        BadInput: its row says ``activation: relu``, its config neither relu nor fatrelu.
    """
    name = base_model.activation_name(config)
    if imported.activation == "relu" and name not in ("relu", "fatrelu"):
        raise BadInput(
            f"compare.imported: {imported.setting} is to run relu, but the config of {imported.source} says {name}: "
            "with a ReLU it was not trained with it would be measured as another model",
            hint="set activation: original to measure it as it is; or make it the model.source of a recipe of its own, "
            "whose rows train with ReLU",
        )


def _size(folder: Path) -> int:
    """Bytes under a folder that other runs may be working in: what vanishes while it is counted does not count."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(os.path.join(parent, name)).st_size
    return found


def _check_compiler(runtime: Runtime) -> None:
    """Both torch.compile's CPU code and the launchers of its GPU code are C++."""
    if not runtime.compile:
        return
    try:
        find_compiler()
    except RuntimeError as error:
        problem = str(error).removeprefix("native kernels: ")
        raise EnvironmentProblem(f"runtime.compile=true, but {problem}", hint="or leave runtime.compile out") from error


def _check_devices(runtime: Runtime) -> None:
    """Every training process on a GPU has one of its own."""
    if not runtime.is_launched or resolve_device(runtime.device) != "cuda":
        return
    import torch

    asked, there = runtime.processes or 1, torch.cuda.device_count()
    if asked > there:
        raise BadInput(
            f"runtime.processes={asked}, but this machine has {there} GPU{'' if there == 1 else 's'}",
            hint="each training process needs a GPU; runtime.device=cpu trains without",
        )
