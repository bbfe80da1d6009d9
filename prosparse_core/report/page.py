"""The page: everything a report shows, in the order it is read, put into one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prosparse_core.report import tables, tables_claim, tables_compare, tables_layers, tables_run, tables_speed
from prosparse_core.report.data import SETTINGS, Record, ReportData
from prosparse_core.report.format import duration, is_number, number, pct, ratio, short, when
from prosparse_core.report.grid import Grid
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_comparison import comparison
from prosparse_core.report.plot_courses import courses
from prosparse_core.report.plot_curve import curve
from prosparse_core.report.plot_layers import layers
from prosparse_core.report.plot_predictor import predictor
from prosparse_core.report.plot_speed import speed
from prosparse_core.report.plot_survivors import survivors
from prosparse_core.report.plot_tradeoff import tradeoff
from prosparse_core.report.plot_training import training
from prosparse_core.report.speed_rows import baseline_name, marked, provider_name, why_refused

PLOTS = (training, tradeoff, layers, survivors, predictor, speed, curve)
OF_A_COMPARISON = (comparison, courses)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """One of the few numbers a report begins with; ``value`` is n/a where there is none, and ``about`` says why."""

    title: str
    value: str
    about: str


def plots(data: ReportData) -> list[Plot]:
    """Every plot of the report, in its order."""
    return [plot(data) for plot in (*(OF_A_COMPARISON if data.is_comparison else ()), *PLOTS)]


def render(data: ReportData) -> str:
    """The report as one HTML document that needs nothing beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = {plot.name: plot for plot in plots(data)}
    return environment.get_template("report.html.j2").render(
        run=data.run,
        css=(_HERE / "report.css").read_text(encoding="utf-8"),
        description=str(data.recipe.get("description") or ""),
        facts=_facts(data),
        trouble=_trouble(data),
        tiles=tiles(data),
        plots=drawn,
        comparison=tables_compare.comparison(data) if data.is_comparison else None,
        matched=tables_claim.matched(data) if data.is_comparison else None,
        verdict=tables_claim.verdict(data) if data.is_comparison else "",
        caveats=tables_claim.caveats(data) if data.is_comparison else [],
        shown=_shown(data),
        results=tables.results(data),
        cliff=tables.cliff(data),
        benchmarks=tables.benchmarks(data),
        exported=tables.exported(data),
        activations=tables_layers.activations(data),
        predictors=tables_run.predictors(data),
        speedups=tables_speed.speedups(data),
        other_speedups=tables_speed.other_speedups(data),
        timings=tables_speed.timings(data),
        decoding=tables_speed.decoding(data),
        stages=tables_run.stages(data),
        steps=tables_run.steps(data),
        machines=tables_run.machines(data),
        examples=examples(data),
    )


def _shown(data: ReportData) -> dict[str, bool]:
    """Which of the sections that a comparison has no steps for are there all the same."""
    return {name: bool(data.steps_of(name)) or not data.is_comparison for name in ("predictor", "speed")}


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """The header: what ran, when, on what, for how long."""
    run, steps = data.run, data["steps"]
    places = [s["provenance"] for s in steps if isinstance(s["provenance"], dict) and s["status"] == "done"]
    own = run["provenance"] if isinstance(run["provenance"], dict) else {}
    machine: Record = dict(own)
    for place in places:
        machine.update({k: v for k, v in place.items() if v is not None})
    parts = [str(machine.get(k)) for k in ("host", "cpu") if machine.get(k)]
    for key, noun in (("cores", "core"), ("threads", "thread")):
        if machine.get(key):
            parts.append(f"{machine[key]} {noun}{'' if machine[key] == 1 else 's'}")
    parts += [f"torch {machine['torch']}"] if machine.get("torch") else []
    # The report is a step of the run it describes: it leaves itself out of the count.
    others = [s for s in steps if not (s["step"] == "report" and s["status"] == "running")]
    words = {"done": "made", "cached": "found in the store", "failed": "failed", "running": "running"}
    counts = [(sum(s["status"] == outcome for s in others), word) for outcome, word in words.items()]
    return [
        ("Run", str(run["run_id"])),
        ("Model", data.model),
        ("Started", when(run["started_at"])),
        ("Wall time", _wall_time(run, others)),
        ("Steps", f"{len(others)}: " + ", ".join(f"{n} {word}" for n, word in counts if n) if others else "none"),
        ("Machine", ", ".join(parts) or "n/a"),
    ]


def _wall_time(run: Record, steps: list[Record]) -> str:
    if is_number(run["wall_s"]):
        return duration(run["wall_s"])
    ends = [s["ended_at"] for s in steps if s["ended_at"] is not None]
    if not ends:
        return "n/a: no step has ended yet"
    return f"{duration((max(ends) - run['started_at']).total_seconds())} up to its last finished step"


def _trouble(data: ReportData) -> dict[str, str] | None:
    """What went wrong, and the way out; None when nothing did."""
    failed = next((s for s in data["steps"] if s["status"] == "failed"), None)
    if data.run["status"] != "failed" and failed is None:
        return None
    return {
        "where": f"at the step “{failed['label']}”" if failed else "outside its steps",
        "error": str((failed or {}).get("error") or data.run["error"] or "no message was recorded"),
        "hint": str((failed or {}).get("hint") or ""),
    }


def tiles(data: ReportData) -> list[Tile]:
    """The result in four numbers."""
    dense, star, ours = (data.main_row(s) for s in ("original", "prosparse_star", "prosparse"))
    why = data.why_missing("evaluate", "prosparse")
    found = []
    if is_number(ours.get("sparsity")):
        about = f"{SETTINGS['prosparse_star'][1]} {pct(star.get('sparsity'))}, original {pct(dense.get('sparsity'))}"
        found.append(Tile("of the FFN activations are exact zeros", pct(ours["sparsity"]), about))
    else:
        found.append(Tile("Sparsity", "n/a", why))
    if is_number(ours.get("perplexity")) and is_number(dense.get("perplexity")):
        about = f"{number(ours['perplexity'])} against {number(dense['perplexity'])} on all corpora together"
        found.append(Tile("the original's perplexity", ratio(ours["perplexity"] / dense["perplexity"]), about))
    else:
        found.append(Tile("Perplexity", "n/a", why))
    if is_number(ours.get("accuracy")):
        score = tables.headline_score(data, ours["variant"])
        error = f"± {100 * score['stderr']:.1f}; " if score and is_number(score["stderr"]) else ""
        task = f" on {score['task']}" if score else f", mean of {ours['num_benchmarks']} benchmarks"
        before = (
            f"original {pct(dense['accuracy'])}"
            if is_number(dense.get("accuracy"))
            else "the original was not measured"
        )
        found.append(Tile(f"accuracy{task}", pct(ours["accuracy"]), error + before))
    else:
        reasons = ours.get("not_measured") or []
        found.append(Tile("Accuracy", "n/a", "; ".join(reasons) or why))
    found.append(_matched_tile(data) if data.is_comparison else _speed_tile(data))
    return found


def _matched_tile(data: ReportData) -> Tile:
    """The sparsest point of ProSparse* that fixed factors reach too: where the claim matters most."""
    rows = [r for r in data["matched"] if (r["setting"], r["measured"]) == (tables_claim.CLAIM, "progressive")]
    there = [r for r in rows if is_number(r["difference_pct"])]
    title = "perplexity of ProSparse* against a fixed factor at the same sparsity"
    if not there:
        return Tile(title, "n/a", (rows and rows[0]["reason"]) or data.why_missing("evaluate", tables_claim.CLAIM))
    row = max(there, key=lambda r: (r["sparsity"], r["variant"]))
    low, high = row["difference_low_pct"], row["difference_high_pct"]
    known = (
        f"95 % interval {tables_claim.signed(low)} to {tables_claim.signed(high)}" if is_number(low) else "no interval"
    )
    about = (
        f"at {pct(row['sparsity'])}; {known}, {row['num_pairs']} pair{'' if row['num_pairs'] == 1 else 's'} of seeds"
    )
    return Tile(title, tables_claim.signed(row["difference_pct"]), about)


def _speed_tile(data: ReportData) -> Tile:
    rows = [r for r in data["speedups"] if r["kernel"] == "ffn" and is_number(r["speedup"]) and r["is_best"]]
    rows = [r for r in rows if r["setting"]] or rows
    rows = [r for r in rows if r["mask_source"] == "recorded"] or rows
    rows = [r for r in rows if r["num_tokens"] == 1] or rows  # decoding one token, as the paper measures
    rows.sort(key=lambda r: -r["speedup"])
    if not rows:
        why = data.why_missing("speed")
        refused = next((r for r in data["refused"] if r["kernel"] == "ffn"), None)
        return Tile("FFN speed-up", "n/a", why_refused(refused) if refused else why)
    best = rows[0]
    parts = [f"{provider_name(best['provider'])} over {baseline_name(best['baseline'])}, {best['dtype']}"]
    parts += [f"byte ratio {ratio(best['byte_ratio'])}"] if is_number(best["byte_ratio"]) else []
    parts += [best["above_byte_ratio_note"]] if best["above_byte_ratio"] else []
    return Tile("as fast an FFN", marked(best), ", ".join(parts))


def examples(data: ReportData) -> list[tuple[str, str]]:
    """Three questions about this very run, with the SQL that answers each."""
    literal = "'" + str(data.run["run_id"]).replace("'", "''") + "'"
    artifacts = [s["artifact"] for s in data["steps"] if s["artifact"]]
    newest = f"'{short(artifacts[-1])}'" if artifacts else "(SELECT max(digest) FROM artifacts)"
    return [
        (
            "The table of results",
            f"SELECT setting, sparsity, perplexity, accuracy, threshold FROM leaderboard WHERE run_id = {literal}",
        ),
        (
            "Every number measured, with its conditions",
            "SELECT setting, kind, name, corpus_or_task, value, unit, stderr, n, conditions FROM results "
            f"WHERE run_id = {literal}",
        ),
        ("What the newest artifact was made from", f"FROM lineage_of({newest})"),
    ]


def summary(data: ReportData) -> list[tuple[str, Grid]]:
    """The closing tables, for places that show tables: (key, grid), those there are."""
    found = {
        "comparison": tables_compare.comparison(data) if data.is_comparison else None,
        "results": tables.results(data),
        "predictors": tables_run.predictors(data),
        "speed": tables_speed.speedups(data),
    }
    return [(key, grid) for key, grid in found.items() if grid is not None]
