"""The main path: from a dense model to a measured sparse one. Read it aloud."""

from __future__ import annotations

from prefect import flow

from flows.run import open_run
from prosparse_core.variants import Variant
from tasks.base_model import base_model
from tasks.calibrate import calibrate
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.mixture import mixture
from tasks.predictor import predictor
from tasks.report import report
from tasks.retention import drop_optimizers
from tasks.speed import speed
from tasks.stage import train_stage
from tasks.step import Run
from tasks.substitute import substitute


def full(run: Run) -> None:
    """Every step, in order. Each is skipped when its artifact is in the store, and goes on where it was interrupted."""
    train = run.recipe.train

    dense = base_model(run)
    corpora = mixture(run, dense)
    substitute(run, dense, corpora)

    checkpoints = [dense]
    for index in range(len(train.stages)):
        checkpoints.append(train_stage(run, train, index, before=checkpoints[-1], corpora=corpora, dense=dense))
        drop_optimizers(run, checkpoints[:-1])
    after_stage_0, trained = checkpoints[1], checkpoints[-1]

    original = Variant("original", dense, "original")
    vanilla_relu = Variant("vanilla_relu", after_stage_0, "relu")
    prosparse_star = Variant("prosparse_star", trained, "relu")
    thresholds = calibrate(run, prosparse_star, corpora)
    prosparse = Variant("prosparse", trained, "fatrelu", thresholds)

    for variant in (original, vanilla_relu, prosparse_star):
        evaluate(run, variant, corpora)
    measured = evaluate(run, prosparse, corpora)
    predictors = predictor(run, prosparse, corpora)
    speed(run, prosparse, corpora, original=original, predictors=predictors)
    export(run, prosparse, measured, corpora)
    report(run)


@flow(name="prosparse", flow_run_name="{recipe}", persist_result=False)
def prosparse(
    recipe: str = "smollm2-135m",
    overrides: list[str] | None = None,
    force: list[str] | None = None,
    until: str | None = None,
) -> str:
    """Sparsify a model as its recipe says. Running it again goes on where it stopped.

    Args:
        recipe: the name of a shipped recipe or the path of a .yaml file.
        overrides: changes to the recipe, such as ``train.lr=2e-4``.
        force: steps to run again though the store has them.
        until: the last step to run.

    Returns:
        The run id under which the ledger keeps it.
    """
    with open_run(recipe, overrides or [], force=force or [], until=until, prefect=True) as run:
        full(run)
    return run.run_id
