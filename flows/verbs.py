"""What each verb of the command line does. Heavy imports stay inside: ``plan`` and ``query`` answer at once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows import console, nodes, summary
from flows.bench_table import bench_rows, bench_tables
from flows.plan_table import verdict
from flows.run import check_steps, home_folder, open_run, planned, terminate_as_exception
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.ledger import EXAMPLES, Ledger
from prosparse_core.store import make_folder
from tasks import preflight
from tasks.step import Run


def verb_run(arguments: argparse.Namespace) -> int:
    """Run a recipe in this process: with Prefect (a server is started for the run if none is up), or without."""
    if _trained_along(arguments, "prosparse"):
        return 0
    from flows.full import full, prosparse

    return _run(arguments, "prosparse", full, prosparse)


def verb_compare(arguments: argparse.Namespace) -> int:
    """Every setting of ``recipe.compare`` under equal tokens."""
    if _trained_along(arguments, "compare"):
        return 0
    from flows.compare import compare, every_setting

    return _run(arguments, "compare", every_setting, compare)


def verb_evaluate(arguments: argparse.Namespace) -> int:
    """Measure any checkpoint, ours or not, without training."""
    _before_prefect(arguments)
    from flows.evaluate import from_command_line

    run_id = from_command_line(arguments)
    if arguments.json:
        console.print_json(summary.load(home_folder(), run_id))
    return 0


def verb_bench(arguments: argparse.Namespace) -> int:
    """Time any checkpoint, ours or not, or a shape: every number with every condition."""
    _before_prefect(arguments)
    from flows.speed import from_command_line

    run_id = from_command_line(arguments)
    rows = bench_rows(Ledger(home_folder()), run_id)
    if arguments.json:
        console.print_json({**summary.load(home_folder(), run_id), "timings": rows})
        return 0
    for title, columns, cells, notes in bench_tables(rows):
        console.table(columns, cells, title=title)
        for note in notes:
            console.out.print(f"  {note}", markup=False)
    return 0


def _trained_along(arguments: argparse.Namespace, flow: str) -> bool:
    """Refuse what cannot end well; then, on another node than the first, do all there is to do there."""
    check_steps(arguments.force, arguments.until)
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    preflight.check(recipe, home_folder(), flow)
    _before_prefect(arguments)
    if not nodes.is_follower(recipe):
        return False
    with terminate_as_exception():
        nodes.follow(recipe)
    return True


def _before_prefect(arguments: argparse.Namespace) -> None:
    """Tell Prefect where to keep things before it is imported."""
    if arguments.json:
        console.only_json()
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")  # nothing leaves the machine unasked
    if not arguments.inline:
        from flows import service

        make_folder(home_folder() / "prefect")
        os.environ.update(service.environment(home_folder()))
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")  # the console tells what Prefect's lines would repeat


def _run(arguments: argparse.Namespace, name: str, steps: Callable[[Run], None], flow: Callable[..., str]) -> int:
    options: dict[str, Any] = {"force": arguments.force, "until": arguments.until}
    if arguments.inline:
        with open_run(arguments.recipe, arguments.overrides, flow=name, **options) as run:
            steps(run)
        run_id = run.run_id
    else:
        from prefect import tags

        from flows import service

        with tags(service.process_tag()):  # lets `recover` tell whether the process of a run still lives
            run_id = flow(recipe=arguments.recipe, overrides=arguments.overrides, **options)
    if arguments.json:
        console.print_json(summary.load(home_folder(), run_id))
    return 0


def verb_plan(arguments: argparse.Namespace) -> int:
    """What would run, what is cached and why not, and what it costs."""
    from flows.compare import every_setting
    from flows.full import full
    from prosparse_core.planning import cost as planning
    from prosparse_core.planning.layout import Asked

    names = (field.name for field in dataclasses.fields(Asked))
    asked = Asked(**{name: getattr(arguments, name) for name in names})
    steps = every_setting if arguments.compare else full
    estimate = planning.comparison_cost if arguments.compare else planning.cost
    recipe, run = planned(arguments.recipe, arguments.overrides, force=arguments.force)
    shape = planning.shape_of(recipe.model)
    speed = _measured_speed(run.ledger, recipe)
    cost = estimate(recipe, shape, speed, asked, psutil.virtual_memory().total) if shape else None
    elsewhere = asked.gpu is not None or preflight.is_for_another_machine(recipe)
    flow, not_checked, problem = ("compare" if arguments.compare else "prosparse"), list[str](), None
    try:
        not_checked = preflight.check(recipe, home_folder(), flow, elsewhere=elsewhere)
    except ProSparseError as error:  # a model or corpus that is not here yet does not hide the costs
        problem = error
    try:
        steps(run)
    except ProSparseError as error:
        problem = problem or error
    if arguments.json:
        console.print_json(
            {
                "recipe": recipe.name,
                "steps": [{"label": label, "outcome": outcome} for label, _, outcome in run.history],
                "cost": dataclasses.asdict(cost) if cost else None,
                "verdict": verdict(cost) if cost else None,
                "not_checked": not_checked,
                "problem": None if problem is None else {"error": str(problem), "hint": problem.hint},
            }
        )
        return problem.exit_code if problem else 0
    console.print_plan(recipe, run, cost)
    console.print_not_checked(not_checked)
    if problem is not None:
        console.print_error(str(problem), problem.hint)
        return problem.exit_code
    return 0


def _measured_speed(ledger: Ledger, recipe: recipes.Recipe) -> float | None:
    """Median training speed of earlier runs of the same model and step size here, if the ledger has any."""
    if not ledger.exists():
        return None
    sql = "SELECT median(tokens_per_s) FROM loss_curve WHERE recipe = " + "'" + recipe.name.replace("'", "''") + "'"
    rows = ledger.query(sql).rows
    return float(rows[0][0]) if rows and rows[0][0] else None


def verb_validate(arguments: argparse.Namespace) -> int:
    """Everything that a run of the recipe would refuse, its settings where it names some; and what only a network, or
    the machine it is to run on, can tell."""
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    flow = "compare" if "compare" in recipe.model_fields_set else "prosparse"
    elsewhere = preflight.is_for_another_machine(recipe)
    not_checked = preflight.check(recipe, home_folder(), flow, elsewhere=elsewhere)
    if arguments.json:
        console.print_json({**recipe.model_dump(mode="json"), "not_checked": not_checked})
    else:
        console.out.print(
            f"{recipe.name}: valid, {len(recipe.train.stages)} stages, {recipe.train.total_tokens:,} tokens"
        )
        console.print_not_checked(not_checked)
    return 0


def verb_recipes(arguments: argparse.Namespace) -> int:
    """The shipped recipes."""
    loaded = [recipes.load(name) for name in recipes.names()]
    rows = [
        [r.name, r.description, len(r.train.stages), r.train.total_tokens, max(s.l1 for s in r.train.stages)]
        for r in loaded
    ]
    columns = ["recipe", "description", "stages", "tokens", "largest lambda"]
    _print(arguments, columns, rows)
    return 0


def verb_query(arguments: argparse.Namespace) -> int:
    """SQL on the published ledger; the questions people ask first when there is none."""
    if not arguments.sql:
        _print(arguments, ["question", "sql"], [list(example) for example in EXAMPLES])
        return 0
    found = Ledger(home_folder()).query(arguments.sql)
    _print(arguments, found.columns, found.rows)
    return 0


def verb_up(arguments: argparse.Namespace) -> int:
    from flows import service

    return _print_status(arguments, service.up(home_folder(), pool=arguments.pool, progress=console.say))


def verb_down(arguments: argparse.Namespace) -> int:
    from flows import service

    return _print_status(arguments, service.down(home_folder(), progress=console.say))


def verb_status(arguments: argparse.Namespace) -> int:
    """The services, and the newest runs of the ledger."""
    from flows import service

    ledger = Ledger(home_folder())
    runs = ledger.query("FROM runs ORDER BY started_at DESC LIMIT 10") if ledger.exists() else None
    return _print_status(arguments, service.status(home_folder()), runs)


def verb_recover(arguments: argparse.Namespace) -> int:
    """Mark dead runs, in Prefect and in the ledger."""
    from flows import service
    from flows.run import mark_dead_runs

    marked = service.recover(home_folder())
    dead = mark_dead_runs(home_folder())
    _print(arguments, ["marked as dead"], [[name] for name in [*marked, *dead]])
    return 0


def verb_doctor(arguments: argparse.Namespace) -> int:
    from flows import doctor

    findings = doctor.examine(home_folder(), verify_store=arguments.verify)
    _print(
        arguments, ["check", "state", "found", "way out"], [[f.check, f.state, f.found, f.way_out] for f in findings]
    )
    return 3 if any(f.state == "broken" for f in findings) else 0


def verb_report(arguments: argparse.Namespace) -> int:
    """Write the report of a finished run from the ledger, or a page of a comparison or of evaluations."""
    from prosparse_core.report import write_report, write_results

    ledger = Ledger(home_folder())
    ledger.bring_up_to_date()
    if arguments.markdown:
        written = write_results(ledger, arguments.run, Path(arguments.markdown))
        _print(arguments, ["results page"], [[str(written[0].resolve())]])
        return 0
    if len(arguments.run) > 1:
        raise BadInput("a report is about one run", hint="--markdown DIR writes one page about several")
    target = Path(arguments.out or "report.html")
    run_id = _finished_run(ledger, next(iter(arguments.run), None), "flow IN ('prosparse', 'compare')")
    write_report(ledger, run_id, target)
    _print(arguments, ["report"], [[str(target.resolve())]])
    return 0


def verb_export(arguments: argparse.Namespace) -> int:
    """The model of a run in the format of another program; refuses to overwrite."""
    ledger = Ledger(home_folder())
    step = "predictor" if arguments.to == "powerinfer" else "export"
    made = f"run_id IN (SELECT run_id FROM steps WHERE step = '{step}' AND artifact IS NOT NULL)"
    run_id = _finished_run(ledger, arguments.run, made)
    if arguments.to == "powerinfer":
        return _export_powerinfer(arguments, run_id, ledger)
    if arguments.to != "hf":
        return _export_plain(arguments, run_id, ledger)
    rows = ledger.query(
        f"SELECT a.path, r.recipe FROM steps s JOIN runs r USING (run_id) JOIN artifacts a ON a.digest = s.artifact "
        f"WHERE s.run_id = '{run_id}' AND s.step = 'export'"
    ).rows
    if not rows:
        raise BadInput(f"run {run_id} exported no model", hint="let it run to its end: prosparse run RECIPE")
    source = _export_folder(Path(rows[0][0]))
    target = Path(arguments.out or f"{rows[0][1]}-prosparse")
    if target.exists():
        raise BadInput(f"{target} is there already", hint="give another folder with --out")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copytree(source, temporary)
    os.replace(temporary, target)
    _print(arguments, ["model"], [[str(target.resolve())]])
    return 0


def _export_powerinfer(arguments: argparse.Namespace, run_id: str, ledger: Ledger) -> int:
    """One file for PowerInfer's own binary, checked and measured before it is kept."""
    from tasks.export_formats import made_by, to_powerinfer

    made = made_by(run_id, "predictor", ledger, home_folder())
    target = Path(arguments.out or f"{made.recipe}-prosparse.powerinfer.gguf")
    found = to_powerinfer(
        made,
        target,
        cutoff=arguments.cutoff,
        dtype=arguments.dtype,
        strict=arguments.strict,
        progress=console.say,
    )
    values = {**dataclasses.asdict(found), "notes": [*found.notes, *found.remarks]}
    del values["remarks"]
    return _print_export(arguments, values)


def _export_plain(arguments: argparse.Namespace, run_id: str, ledger: Ledger) -> int:
    """A folder that needs no code of ours."""
    from prosparse_core.formats.plain import export_hf_relu, export_vllm
    from tasks.export_formats import made_by

    made = made_by(run_id, "export", ledger, home_folder())
    ending, export = {"vllm": ("vllm", export_vllm), "hf-relu": ("relu", export_hf_relu)}[arguments.to]
    target = Path(arguments.out or f"{made.recipe}-prosparse-{ending}")
    return _print_export(arguments, dataclasses.asdict(export(made.variant, target, strict=arguments.strict)))


def _print_export(arguments: argparse.Namespace, values: dict[str, Any]) -> int:
    values = {**values, "target": str(values["target"].resolve()), "notes": list(values["notes"])}
    for note in values["notes"]:
        console.say(f"note: {note}")
    if arguments.json:
        console.print_json(values)
    else:
        console.table(["", "value"], [[name, value] for name, value in values.items() if name != "notes"])
    return 0


def _export_folder(path: Path) -> Path:
    folder = path if path.is_absolute() else home_folder() / path
    return folder / "hf"


def _finished_run(ledger: Ledger, run_id: str | None, among: str) -> str:
    """The run asked for, or the newest finished one of those that a condition holds of.

    Raises:
        BadInput: no such run, or none finished yet.
    """
    where = f"status = 'done' AND {among}" if run_id is None else "run_id = '" + run_id.replace("'", "''") + "'"
    rows = ledger.query(f"SELECT run_id FROM runs WHERE {where} ORDER BY started_at DESC LIMIT 1").rows
    if not rows:
        what = "no finished run of the kind in the ledger" if run_id is None else f"no run {run_id!r} in the ledger"
        raise BadInput(what, hint='prosparse query "SELECT run_id, status FROM runs"')
    return str(rows[0][0])


def _print_status(arguments: argparse.Namespace, status: Any, runs: Any = None) -> int:
    data = dataclasses.asdict(status)
    if arguments.json:
        if runs is not None:
            data["runs"] = [dict(zip(runs.columns, row, strict=True)) for row in runs.rows]
        console.print_json(data)
        return 0
    console.table(
        ["service", "state"], [[k, v if isinstance(v, str) else json.dumps(v, default=str)] for k, v in data.items()]
    )
    if runs is not None:
        keep = [runs.columns.index(c) for c in ("run_id", "recipe", "status", "started_at", "ended_at")]
        console.table(
            [runs.columns[i] for i in keep], [[row[i] for i in keep] for row in runs.rows], title="newest runs"
        )
    return 0


def _print(arguments: argparse.Namespace, columns: list[str], rows: list[Any]) -> None:
    if arguments.json:
        console.print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        console.table(columns, rows)
