"""Under which conditions runs were made, and how far their numbers reach: all of it from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prosparse_core.report.courses import course_order
from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import NA, count, duration, is_number, when
from prosparse_core.report.grid import Cell, Column, Grid
from prosparse_core.report.names import factor, name_of, seeds
from prosparse_core.report.tables_run import VERSIONS


def conditions(runs: Sequence[ReportData]) -> Grid:
    """What, when, on what and with what: one column per run."""
    columns = [Column("", is_number=False)]
    grid = Grid("Conditions", [*columns, *(Column(str(d.run["run_id"]), is_number=False) for d in runs)])
    lines = [
        ("Recipe", lambda d: str(d.run["recipe"])),
        ("Model", lambda d: d.model),
        ("Kind", lambda d: "comparison of settings" if d.is_comparison else f"flow {d.run['flow']}"),
        ("Started", lambda d: when(d.run["started_at"])),
        ("Outcome", lambda d: f"{d.run['status']}, {_time(d)}"),
        ("Training tokens per setting", lambda d: _tokens(d) or NA),
        ("Held-out tokens", _held_out),
        ("Evaluation: precision, batch size", _evaluated_with),
        ("Seeds of the data order", lambda d: seeds(_seeds(d)) or NA),
        ("Processor", lambda d: _of_places(d, "cpu")),
        ("Cores, threads", lambda d: f"{_of_places(d, 'cores')}, {_of_places(d, 'threads')}"),
        ("Versions", lambda d: ", ".join(f"{name} {_of_places(d, name)}" for name in VERSIONS)),
    ]
    for name, of in lines:
        grid.rows.append([Cell(name), *(Cell(of(data)) for data in runs)])
    return grid


def limits(runs: Sequence[ReportData]) -> list[str]:
    """What the numbers cannot carry, one sentence each."""
    data = runs[0]
    machines = {(p.get("host"), p.get("cpu")) for run in runs for p in _places(run)}
    said = [f"Everything ran on {len(machines)} machine{'' if len(machines) == 1 else 's'}."] if machines else []
    tokens = _tokens(data)
    said += [f"Training tokens per setting: {tokens}; what holds so early need not hold later."] if tokens else []
    rows = sorted(data["comparison"], key=lambda r: (*course_order(r, None), r["variants"]))
    trained = [r for r in rows if r["tokens_seen"]]
    single = [_named(r, trained) for r in trained if r["num_seeds"] < 2]
    several = [_named(r, trained) for r in trained if r["num_seeds"] > 1]
    if single:
        said.append(f"One seed, so no spread over seeds: {', '.join(single)}.")
    if several:
        most = max(r["num_seeds"] for r in trained)
        said.append(f"Up to {most} seeds: {', '.join(several)}; a standard deviation over so few is itself uncertain.")
    said.append(
        "Standard errors of the evaluation tell how far other text would move a number. All settings read the same "
        "text, so they are wider than what separates two settings; the spread over seeds tells what training repeats."
    )
    said.append(
        "Each arm was measured at a few last factors; between two of them the logarithm of perplexity is taken as "
        "linear in sparsity, and beyond them nothing is claimed."
    )
    dequantised = list(dict.fromkeys(run.model for run in runs if "dequantised" in run.model))
    if dequantised:
        said.append(
            f"The original is {' and '.join(dequantised)}: what training gains, above all where the dense model is "
            "trained on, may in part be the repair of quantisation, and every ratio to the original rests on it."
        )
    section = data.recipe.get("compare")
    imported = section.get("imported") if isinstance(section, dict) else None
    if imported:
        names = ", ".join(name_of(str(i.get("setting"))) for i in imported if isinstance(i, dict))
        said.append(f"{names} saw other training text, and perplexity per token compares only equal tokenizers.")
    if any(r["partial"] for r in rows):
        said.append("Some benchmarks were cut short by a limit on documents.")
    missing = list(dict.fromkeys(note for r in data["leaderboard"] for note in r["not_measured"] or []))
    said += [f"Not measured: {note}." for note in missing]
    absent = [s for s in data.expected if s not in {r["setting"] for r in rows}]
    said += [f"{name_of(s)} is missing: {data.why_missing('evaluate', s)}." for s in absent]
    foreign = dict.fromkeys(data.model_named(r["model"]) for r in data["paper"] if r["is_foreign"])
    if foreign:
        said.append(f"The paper does not treat {', '.join(foreign)}: its numbers stand beside ours as a scale only.")
    return said


def _named(row: Record, rows: Sequence[Record]) -> str:
    """A setting, with its factor where there are rows of several."""
    is_alone = row["setting"] != "fixed_l1" and sum(r["setting"] == row["setting"] for r in rows) == 1
    return name_of(row["setting"]) if is_alone else f"{name_of(row['setting'])} {factor(row['l1'])}".strip()


def _places(data: ReportData) -> list[Record]:
    return [s["provenance"] for s in data["steps"] if isinstance(s["provenance"], dict)]


def _of_places(data: ReportData, key: str) -> str:
    found = dict.fromkeys(str(p[key]) for p in _places(data) if p.get(key) is not None)
    return " / ".join(found) or NA


def _time(data: ReportData) -> str:
    made = [s["made_in_s"] for s in data["steps"] if s["status"] in ("done", "cached") and is_number(s["made_in_s"])]
    return f"{duration(data.run['wall_s'])} in this run, {duration(sum(made))} for all its steps when they were made"


def _tokens(data: ReportData) -> str:
    found = sorted({r["tokens_seen"] for r in data["leaderboard"] if r["tokens_seen"]})
    return " or ".join(count(t) for t in found)


def _held_out(data: ReportData) -> str:
    rows = [r for r in data["scores"] if r["corpus"] and r["metric"] == "token_perplexity" and is_number(r["n"])]
    largest: dict[str, Any] = {}
    for row in rows:
        largest[row["corpus"]] = max(row["n"], largest.get(row["corpus"], 0))
    return ", ".join(f"{corpus} {count(n)}" for corpus, n in sorted(largest.items())) or NA


def _evaluated_with(data: ReportData) -> str:
    found = {(r["dtype"], r["batch_size"]) for r in data["scores"] if r["dtype"]}
    told = [[str(part) for part in pair if part is not None] for pair in sorted(found, key=str)]
    return " / ".join(", ".join(parts) for parts in told) or NA


def _seeds(data: ReportData) -> list[Any]:
    return sorted({r["seed"] for r in data["leaderboard"] if r["seed"] is not None})
