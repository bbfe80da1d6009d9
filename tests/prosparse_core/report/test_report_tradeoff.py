"""The trade-off plot of a run that calibrated one threshold per layer: both rules on it, and what was chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from report_runs import Scribe, write_story

from prosparse_core.report.data import ReportData, collect
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_tradeoff import best_within, tradeoff
from prosparse_core.report.tables import results

STAGES = [{"until_step": 1, "l1": 0.0}]
REMARK = "one threshold per layer reaches less"


class PerLayerScribe(Scribe):
    """Both rules: per layer, the same perplexity is reached at a higher sparsity. Evaluation costs twice as much."""

    def thresholds(self) -> list[dict[str, Any]]:
        variant, *grid = super().thresholds()
        grid = [{**fact, "chosen": False} for fact in grid]
        per_layer = [
            {**fact, "rule": "cett", "scope": "per_layer", "threshold": 1.3 * fact["threshold"]}
            | {"sparsity": fact["sparsity"] + 0.1 * fact["threshold"], "cett": 4 * fact["threshold"]}
            | {"chosen": fact["threshold"] == 0.05}
            for fact in grid
        ]
        return [variant, *grid, *per_layer]

    def variant(self, setting: str) -> dict[str, Any]:
        thresholds = self.made["calibrate"].digest if setting == "prosparse" else None
        return {**super().variant(setting), "thresholds": thresholds}

    def evaluation(self, setting: str) -> list[dict[str, Any]]:
        facts = super().evaluation(setting)
        if setting == "prosparse":
            for fact in facts:
                if fact["table"] == "sparsity":
                    fact["threshold"] = 0.01 * fact["layer"]
        return facts

    def step(self, step: str, *args: Any, meta: dict[str, Any] | None = None, **more: Any) -> None:
        if step == "calibrate":
            meta = {**(meta or {}), "remark": REMARK}
        super().step(step, *args, meta=meta, **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    home = tmp_path_factory.mktemp("per_layer")
    ledger, story = write_story(home, scribe=PerLayerScribe, num_layers=30, stages=STAGES, until="evaluate prosparse")
    return collect(ledger, story.run_id)


@pytest.fixture(scope="module")
def plot(data: ReportData) -> Plot:
    return tradeoff(data)


def drawn(svg: str) -> str:
    """What is on the picture, without its description."""
    return svg.partition(">")[2]


def test_both_rules_are_on_the_plot(plot: Plot) -> None:
    assert {(r["rule"], r["scope"]) for r in plot.rows} == {("grid", "global"), ("cett", "per_layer")}
    for svg in (drawn(plot.wide), drawn(plot.narrow)):
        assert "all corpora together, one t per layer" in svg
        assert "the same, one t for all layers" in svg
        assert svg.count("mean t = ") == 2, "the chosen point is named in both panels"
        assert "budget +1" in svg
    assert "one t per layer, mean t = 0.065" in plot.alt
    assert "In its place, one t for all layers, t = 0.05" in plot.alt
    assert plot.csv().splitlines()[0].startswith("corpus,threshold,cett,")


def test_what_it_became_on_the_evaluation_files_and_what_calibration_remarked(data: ReportData, plot: Plot) -> None:
    held_out, remark = plot.remarks
    row = next(r for r in data["held_out"] if r["corpus"] == "mixed")
    assert row["perplexity_increase_pct"] == pytest.approx(100 * (1.22 / 1.21 - 1))
    assert f"change perplexity by {row['perplexity_increase_pct']:+.2f} %" in held_out
    assert f"(calibration: {row['promised_increase_pct']:+.2f} %)" in held_out
    assert remark == "One threshold per layer reaches less."


def test_the_table_marks_a_mean(data: ReportData) -> None:
    grid = results(data)
    place = [c.title for c in grid.columns].index("Threshold")
    cells = {row[0].text: row[place] for row in grid.rows}
    assert (cells["ProSparse"].text, cells["ProSparse"].small) == ("0.145", "mean over layers")
    assert cells["ProSparse*"].small == ""


def test_a_run_with_the_grid_alone_shows_one_curve(data: ReportData) -> None:
    grid = [{**r, "chosen": r["threshold"] == 0.05} for r in data["tradeoff"] if r["rule"] == "grid"]
    plot = tradeoff(dataclasses.replace(data, subjects={**data.subjects, "tradeoff": grid, "held_out": []}))
    assert "one t" not in drawn(plot.wide)
    assert "In its place" not in plot.alt
    assert "Chosen: one t for all layers, t = 0.05" in plot.alt
    assert plot.remarks == ["One threshold per layer reaches less."]


def test_what_a_rule_would_have_chosen() -> None:
    rows: list[dict[str, Any]] = [
        {"threshold": t, "perplexity_increase_pct": p} for t, p in ((0.3, 0.2), (0.0, 0.0), (0.1, 0.9), (0.2, 1.1))
    ]
    best = best_within(rows, 1.0)
    assert best is not None
    assert best["threshold"] == 0.1, "a dip after the budget was broken is not taken"
    assert best_within(rows, None) is None
    assert best_within([{"threshold": 0.0, "perplexity_increase_pct": None}], 1.0) is None
