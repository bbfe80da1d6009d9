"""report: the run as one HTML page with the data behind its plots; shown in Prefect too."""

from __future__ import annotations

import logging

from prosparse_core.store import Artifact
from tasks.step import Run, Work

VERSION = 2
PAGE = "report.html"
DATA = "data"
log = logging.getLogger("prosparse.report")


def report(run: Run) -> Artifact:
    """The artifact with ``report.html`` and, in ``data/``, one CSV per plot; stands on all the run has made so far.

    Within Prefect the closing tables become artifacts of the flow run, also when the page itself was in the store.
    """
    artifact = run.step(
        "report",
        "report",
        lambda work: _build(work, run),
        version=VERSION,
        config={"recipe": run.recipe.name, "description": run.recipe.description, "model": run.recipe.model.id},
        inputs=_inputs(run),
    )
    if run.prefect and not run.planning:
        attach(run, artifact)
    return artifact


def attach(run: Run, artifact: Artifact) -> list[str]:
    """Give the flow run its closing tables and a link to the page; returns the keys of what was attached.

    Whatever goes wrong on the way to Prefect is noted and does no harm: the page is in the store all the same.
    """
    from prosparse_core.report import closing_tables, collect

    attached: list[str] = []
    try:
        from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

        tables = closing_tables(collect(run.ledger, run.run_id))
        page = (artifact.path / PAGE).resolve()
        text = "\n".join(
            [f"# {run.recipe.name}", "", f"Run `{run.run_id}`, page `{page}`", "", *(text for _, text, _ in tables)]
        )
        create_markdown_artifact(text, key="prosparse-results", description=f"Closing tables of run {run.run_id}")
        attached.append("prosparse-results")
        for key, _, rows in tables:
            create_table_artifact(rows, key=f"prosparse-table-{key}", description=f"{key} of run {run.run_id}")
            attached.append(f"prosparse-table-{key}")
        create_link_artifact(page.as_uri(), link_text=f"Report of {run.run_id}", key="prosparse-report")
        attached.append("prosparse-report")
    except Exception as error:
        log.warning(
            "the report is written, but not everything of it is in Prefect (attached: %s): %s: %s",
            ", ".join(attached) or "nothing",
            type(error).__name__,
            error,
        )
    return attached


def _build(work: Work, run: Run) -> None:
    from prosparse_core.report import collect, write_data, write_page

    work.progress.note("reading the ledger")
    data = collect(run.ledger, run.run_id)
    write_page(data, work.folder / PAGE)
    written = write_data(data, work.folder / DATA)
    work.meta.update(run_id=run.run_id, page=PAGE, data=[path.name for path in written])


def _inputs(run: Run) -> dict[str, Artifact]:
    """Everything the run has made or found, by label; while planning also what is not there yet."""
    inputs: dict[str, Artifact] = {}
    for label, artifact, _ in run.history:
        if artifact is None and not run.planning:
            continue
        number, role = 1, label
        while role in inputs:
            number, role = number + 1, f"{label} ({number + 1})"
        inputs[role] = artifact or Artifact("report", label, None, None, None)
    return inputs
