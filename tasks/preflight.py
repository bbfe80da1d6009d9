"""What must hold before anything expensive starts: the model is there, the data is there, the disk has room."""

from __future__ import annotations

from pathlib import Path

from prosparse_core.planning import shape_of
from prosparse_core.planning_disk import disk
from prosparse_core.recipe import Recipe
from prosparse_core.store import require_space
from tasks import base_model
from tasks.benchmarks import plan_benchmarks


def check(recipe: Recipe, home: Path) -> None:
    """Refuse a run that cannot end well.

    Raises:
        BadInput: a missing model folder, a GGUF that is none, an unknown family, missing data files, a benchmark that
            is unknown or not allowed.
        EnvironmentProblem: a missing package, too little room in the store.
    """
    from prosparse_core.sources import check_source

    base_model.identity(recipe.model)
    for source in recipe.data.sources:
        check_source(source)
    plan_benchmarks(recipe.evaluate)
    shape = shape_of(recipe.model)
    if shape is not None and not (home / "store" / "export").is_dir():
        require_space(home, disk(recipe, shape).most[recipe.runtime.keep], f"a run of {recipe.name}")
