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
from prosparse_core.precision import resolve_device
from prosparse_core.recipe import Imported, Recipe, Runtime
from prosparse_core.store import require_space
from tasks import base_model
from tasks.evaluation.benchmarks import plan_benchmarks
from tasks.evaluation.checkpoint import config_of, of_source
from tasks.mixture import require_documents_apart


def check(recipe: Recipe, home: Path, flow: str = "prosparse") -> None:
    """Refuse a run that cannot end well.

    Args:
        flow: which takes the recipe: prosparse its stages, compare its settings, evaluate its corpora only.

    Raises:
        BadInput: a missing model folder, a GGUF that is none, an unknown family, missing data files, a benchmark that
            is unknown or not allowed, a setting the recipe lacks something for, an imported folder that was not trained
            with ReLU as its row says, more training processes than GPUs, an architecture that cannot keep the documents
            of a window apart.
        EnvironmentProblem: a missing package or compiler, too little room in the store.
    """
    from prosparse_core.data.sources import check_source

    base_model.identity(recipe.model)
    for source in recipe.data.sources:
        check_source(source)
    plan_benchmarks(recipe.evaluate)
    if flow == "evaluate":
        return
    trained = None
    if flow == "compare":
        rows = settings.rows(recipe)
        trained = settings.training_of(rows, recipe.seed)
        for imported in recipe.compare.imported:
            _check_import(imported)
    else:
        settings.require_relu(recipe)
    _check_documents(recipe)
    _check_devices(recipe.runtime)
    _check_compiler(recipe.runtime)
    shape = shape_of(recipe.model)
    if shape is not None:
        stages = (trained.num_stages, trained.num_last) if trained else ()
        most = disk(recipe, shape, *stages).most[recipe.runtime.keep]
        # What an earlier attempt has left is not needed once more.
        require_space(home, max(0, most - _size(home / "store")), f"a run of {recipe.name}")


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


def _check_import(imported: Imported) -> None:
    """What can be told without a hub: the rest is told when its base_model step has run, before anything is trained."""
    folder = Path(imported.source).expanduser()
    if not folder.is_dir():
        base_model.identity(imported.model)
        return
    of_source(imported.model)
    config = config_of(folder)
    if base_model.activation_name(config) is not None:  # else transformers knows the default when it has read it
        require_relu(imported, config)


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
