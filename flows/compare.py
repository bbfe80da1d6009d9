"""Every setting of the paper's tables under equal tokens: same data order, shared beginnings trained once."""

from __future__ import annotations

import dataclasses

from prefect import flow

from flows.run import open_run
from prosparse_core import settings
from prosparse_core.recipe import Imported
from prosparse_core.settings import Row
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL, Variant, check_folder
from tasks.base_model import OWN_ACTIVATIONS, base_model, check_chain
from tasks.calibrate import calibrate
from tasks.evaluate import evaluate
from tasks.evaluation.checkpoint import checkpoint, of_source
from tasks.mixture import mixture
from tasks.preflight import require_relu
from tasks.report import report
from tasks.retention import drop_optimizers
from tasks.stage import train_stage
from tasks.step import Run


def every_setting(run: Run) -> None:
    """Train, calibrate and evaluate every row of ``recipe.compare``; what rows have in common is in the store."""
    dense = base_model(run)
    # Before the first row: a mistyped hub id must not be told after hours of training.
    imports = [(imported, import_checkpoint(run, imported)) for imported in run.recipe.compare.imported]
    corpora = mixture(run, dense)
    rows = settings.rows(run.recipe)
    check_chain(run, dense, [row.train.activation for row in rows if row.train])
    for number, row in enumerate(rows):
        needed = settings.continued(rows[number + 1 :], run.recipe.seed)
        variant = trained(run, row, dense, corpora, needed)
        if row.thresholds_of:
            variant = with_thresholds(run, variant, corpora, row.setting, row.note)
        evaluate(run, variant, corpora, row.note)
    for imported, variant in imports:
        measure_import(run, imported, variant)
    report(run)


def import_checkpoint(run: Run, imported: Imported) -> Variant:
    """A checkpoint that others trained, brought into the store, as the variant of its row.

    Raises:
        BadInput: it cannot be had or read, or it is to run ReLU and was not trained with it.
    """
    found = checkpoint(run, of_source(imported.model))
    if imported.activation == "original":
        as_it_is = found.activation if found.activation in OWN_ACTIVATIONS.values() else "original"
        return dataclasses.replace(found, setting=imported.setting, activation=as_it_is)
    if found.checkpoint.folder is not None:
        require_relu(imported, check_folder(found.checkpoint.path / MODEL))
    return Variant(imported.setting, found.checkpoint, "relu")


def measure_import(run: Run, imported: Imported, variant: Variant) -> None:
    """Evaluate an imported row, a ReLU model also with thresholds; held-out files are encoded by its own tokenizer."""
    corpora = mixture(run, variant.checkpoint)
    # It goes by its own name in the ledger: beside the paper it stands for its own model, not for the recipe's.
    model = imported.model.model_copy(update={"precision": run.recipe.model.precision})
    named = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"model": model}))
    evaluate(named, variant, corpora)
    if variant.activation == "relu":
        own = settings.with_thresholds(imported.setting)
        evaluate(named, with_thresholds(named, variant, corpora, own, own), corpora)


def trained(run: Run, row: Row, dense: Artifact, corpora: Artifact, needed: set[str]) -> Variant:
    """The variant of a row after all its stages, before thresholds.

    ``needed``: the stages that later rows go on from, as :func:`prosparse_core.settings.course` names them.
    """
    if row.train is None:
        return Variant(row.setting, dense, "original")
    checkpoints, names = [dense], settings.course(row, run.recipe.seed)
    for index in range(len(row.train.stages)):
        before, seed = checkpoints[-1], row.seed
        checkpoints.append(
            train_stage(run, row.train, index, before=before, corpora=corpora, dense=dense, seed=seed, note=row.note)
        )
        drop_optimizers(run, [c for c, name in zip(checkpoints[1:-1], names, strict=False) if name not in needed])
    setting = row.thresholds_of or row.setting
    return Variant(setting, checkpoints[-1], row.train.activation, shift=row.train.shift)


def with_thresholds(run: Run, star: Variant, corpora: Artifact, setting: str, note: str) -> Variant:
    """The same checkpoint with calibrated FATReLU thresholds."""
    thresholds = calibrate(run, star, corpora, note)
    return dataclasses.replace(star, setting=setting, activation="fatrelu", thresholds=thresholds)


@flow(name="compare", flow_run_name="{recipe}", persist_result=False)
def compare(
    recipe: str = "smollm2-135m",
    overrides: list[str] | None = None,
    force: list[str] | None = None,
    until: str | None = None,
) -> str:
    """Compare settings as ``recipe.compare`` says. Running it again goes on where it stopped.

    Args:
        recipe: the name of a shipped recipe or the path of a .yaml file.
        overrides: changes to the recipe, such as ``compare.settings=[vanilla_relu,prosparse]``.
        force: steps to run again though the store has them.
        until: the last step to run.

    Returns:
        The run id under which the ledger keeps it.
    """
    with open_run(recipe, overrides or [], flow="compare", force=force or [], until=until, prefect=True) as run:
        every_setting(run)
    return run.run_id
