"""``runtime.keep: last``: the optimizer's state of a stage goes as soon as no stage of the run goes on from it.

Weights, log and record of the stage stay, and so does its digest: whatever was measured of it stays valid. Only a stage
that is trained anew needs the state; :func:`tasks.stage.train_stage` then makes it again, aloud.
"""

from __future__ import annotations

from collections.abc import Iterable

from prosparse_core.store import Artifact
from prosparse_core.variants import OPTIMIZER
from tasks.step import Run

GIB = 2**30


def drop_optimizers(run: Run, stages: Iterable[Artifact]) -> None:
    """Under ``runtime.keep: last``, drop the states that finished stages left; nothing for what is no stage.

    What was dropped, and why, is in the artifact's folder and in the ledger (``retention``).
    """
    if run.planning or run.recipe.runtime.keep == "all":
        return
    for stage in stages:
        freed = run.store.drop(stage, OPTIMIZER, f"runtime.keep=last, run {run.run_id}") if stage.step == "stage" else 0
        if freed:
            run.ledger.record_artifact(stage.path)
            size = f"{freed / GIB:,.2f} GiB" if freed > GIB else f"{freed / 2**20:,.1f} MiB"
            run.watcher.outcome(stage.label, "dropped", f"its optimizer's state, {size} (runtime.keep=last)")
