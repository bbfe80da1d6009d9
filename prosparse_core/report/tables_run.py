"""The tables of the run itself: predictors in numbers, the recipe's stages, steps with their lineage, machines."""

from __future__ import annotations

import statistics
from typing import Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import NA, count, duration, is_number, number, pct, plain, short, size, when
from prosparse_core.report.grid import NOT_APPLICABLE, Cell, Column, Grid
from prosparse_core.report.plot_predictor import mean_by_cutoff

VERSIONS = ("python", "torch", "transformers", "lm_eval", "triton")
LAST_STEPS = 10
"""What a stage ended with is the median over its last logged steps, this many."""
TONES = {"done": "good", "failed": "bad", "cached": "quiet"}


def predictors(data: ReportData) -> Grid | None:
    """Recall and sparsities at every cutoff, as means over layers."""
    columns = ("recall", "predicted_sparsity", "true_sparsity")
    names = [
        Column("Predictor", is_number=False),
        *(Column(t) for t in ("Cutoff", "Recall", "Predicted sparsity", "True sparsity")),
    ]
    grid = Grid("Predictors, means over layers", names)
    rows = data["predictors"]
    for hidden, rule in sorted({_kind(r) for r in rows}):
        for mean in mean_by_cutoff([r for r in rows if _kind(r) == (hidden, rule)]):
            found = [
                Cell(pct(mean[c])) if is_number(mean[c]) else grid.missing("undefined in every layer") for c in columns
            ]
            name = Cell(f"{hidden} hidden" if hidden else "predictor", f"active: {rule}" if rule else "")
            grid.rows.append([name, Cell(plain(mean["cutoff"])), *found])
    return grid if rows else None


def _kind(row: Record) -> tuple[int, str]:
    return row["hidden"] or 0, row["label_rule"] or ""


def stages(data: ReportData) -> Grid | None:
    """The recipe's stages beside what each ended with."""
    train = data.recipe.get("train")
    planned = train.get("stages") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(planned, list):
        return None
    columns = [
        Column("Stage"),
        Column("Steps"),
        Column("Tokens", "up to its end"),
        Column("Lambda", "at its end"),
        Column("Ramp", is_number=False),
    ]
    ended = f"median of the last {LAST_STEPS} logged steps"
    columns += [
        Column(t, s, group=f"Ended with ({ended})") for t, s in (("Loss", "nats"), ("Sparsity", ""), ("Tokens/s", ""))
    ]
    grid = Grid("Stages of the recipe", columns)
    first = 0
    for index, stage in enumerate(planned):
        until, ramp = stage.get("until_step"), stage.get("ramp", "constant")
        steps = f"{first + 1:,}\u2013{until:,}" if isinstance(until, int) and until > first else NA
        tokens = (
            until * train["tokens_per_step"] if is_number(until) and is_number(train.get("tokens_per_step")) else None
        )
        phase = stage.get("phase", "prosparse")
        line = [Cell(str(index)), Cell(steps), Cell(count(tokens)), Cell(plain(stage.get("l1")))]
        line.append(Cell(str(ramp), "" if phase == "prosparse" else str(phase)))
        logged = [r for r in data["training"] if r["stage"] == index][-LAST_STEPS:]
        for column, show in (("lm_loss", number), ("sparsity", pct), ("tokens_per_s", _three)):
            values = [r[column] for r in logged if is_number(r[column])]
            line.append(
                Cell(show(statistics.median(values)))
                if values
                else grid.missing(_why_no_stage(data, index, bool(logged)))
            )
        grid.rows.append(line)
        first = until if isinstance(until, int) else first
    return grid


def _three(value: float) -> str:
    return number(value, 3)


def _why_no_stage(data: ReportData, index: int, is_logged: bool) -> str:
    steps = [s for s in data.steps_of("stage") if s["stage"] == index]
    if is_logged or any(s["status"] in ("done", "cached") for s in steps):
        return "the stage's log has no such number"
    if steps:
        return f"the step “{steps[-1]['label']}” {'is still running' if steps[-1]['status'] == 'running' else 'failed'}"
    return "this run did not reach the stage"


def steps(data: ReportData) -> Grid:
    """Every step: whether it was made or found in the store, how long it took, what it left and from what."""
    columns = [
        Column("#"),
        Column("Step", is_number=False),
        Column("Outcome", is_number=False),
        Column("In this run"),
        Column("When made"),
    ]
    columns += [Column("Artifact", is_number=False), Column("Size"), Column("Made from", is_number=False)]
    grid = Grid("Steps and lineage", columns)
    blank = Cell(NOT_APPLICABLE, tone="quiet")
    # The report is a step of the run it describes, and not yet over when it is written.
    written = [s for s in data["steps"] if not (s["step"] == "report" and s["status"] == "running")]
    for number_, step in enumerate(written, start=1):
        status = step["status"]
        inputs = [e for e in data["lineage"] if e["artifact"] == step["artifact"]]
        found = [f"{e['role']} {short(e['input'])[:8]}" for e in inputs]
        made_from = ", ".join(found) if len(found) <= 4 else f"{len(found)} artifacts"
        grid.rows.append(
            [
                Cell(str(number_)),
                Cell(step["label"]),
                Cell(status, step["error"] or "", tone=TONES.get(status, "")),
                Cell(duration(step["wall_s"])) if is_number(step["wall_s"]) else blank,
                Cell(duration(step["made_in_s"]), when(step["made_at"])) if step["artifact"] else blank,
                Cell(short(step["artifact"]), is_code=True) if step["artifact"] else blank,
                Cell(size(step["bytes"])) if step["artifact"] else blank,
                Cell(made_from) if made_from else blank,
            ]
        )
    return grid


def machines(data: ReportData) -> Grid:
    """Where the artifacts were made and with what: one line per machine, versions that differ side by side."""
    columns = [Column(t, is_number=False) for t in ("Machine", "Processor", "Threads", *VERSIONS, "Steps")]
    grid = Grid("Machines and versions", columns)
    found: dict[Any, list[Record]] = {}
    for step in data["steps"]:
        if isinstance(step["provenance"], dict):
            place = step["provenance"]
            found.setdefault((place.get("host"), place.get("cpu"), place.get("cores")), []).append(step)
    for (host, cpu, cores), made in found.items():
        places = [s["provenance"] for s in made]
        line = [
            Cell(str(host or NA)),
            Cell(str(cpu or NA), f"{cores} cores" if cores else ""),
            Cell(_values(places, "threads")),
        ]
        line += [Cell(_values(places, name)) for name in VERSIONS]
        names = list(dict.fromkeys(s["step"] for s in made))
        grid.rows.append([*line, Cell("all" if len(found) == 1 else ", ".join(names))])
    return grid


def _values(places: list[Record], key: str) -> str:
    return ", ".join(dict.fromkeys(str(p[key]) for p in places if p.get(key) is not None)) or NOT_APPLICABLE
