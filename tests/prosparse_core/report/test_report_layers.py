"""What the report says of the activations that are left: the table, the figure, and what is missing of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import Scribe, write_story

from prosparse_core.report import collect
from prosparse_core.report.data import ReportData
from prosparse_core.report.format import pct, ratio
from prosparse_core.report.plot_survivors import by_layer, survivors
from prosparse_core.report.tables_layers import NO_CHUNK, NO_DENSE, OLDER, activations


class OldScribe(Scribe):
    """Evaluations from before survivors and chunks were measured."""

    def evaluation(self, setting: str) -> list[dict[str, Any]]:
        new = {"mean_abs_live", "chunk_sparsity"}
        return [{k: v for k, v in fact.items() if k not in new} for fact in super().evaluation(setting)]


class NoDenseScribe(Scribe):
    """The original was not measured, and no sequence was as long as a chunk."""

    def evaluation(self, setting: str) -> list[dict[str, Any]]:
        facts = [] if setting == "original" else super().evaluation(setting)
        return [{**f, "chunk_sparsity": None} if f["table"] == "sparsity" else f for f in facts]


def told(folder: Path, scribe: type[Scribe] = Scribe) -> ReportData:
    ledger, story = write_story(folder, scribe, num_layers=4, stages=[{"until_step": 1, "l1": 0.0}])
    return collect(ledger, story.run_id)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return told(tmp_path_factory.mktemp("whole"))


def test_the_table_is_the_ledgers(data: ReportData) -> None:
    grid = activations(data)
    assert grid is not None
    assert [row[0].text for row in grid.rows] == ["Original", "Vanilla ReLU", "ProSparse*", "ProSparse"]
    assert all(column.small for column in grid.columns[1:]), "every number says what it is"
    assert not grid.notes
    own = [r for r in data["layers"] if r["setting"] == "prosparse"]
    for column, cell in zip(("sparsity", "chunk_sparsity", "dead_frac"), grid.rows[-1][1:], strict=False):
        assert cell.text == pct(sum(r[column] for r in own) / len(own))
    assert grid.rows[-1][5].text == ratio(sum(r["survivor_ratio"] for r in own) / len(own))
    assert grid.rows[0][5].text == ratio(1.0)


def test_the_figure_draws_every_setting_but_the_original(data: ReportData) -> None:
    plot = survivors(data)
    assert plot.paint is not None
    assert {r["setting"] for r in plot.rows} == {"vanilla_relu", "prosparse_star", "prosparse"}
    for svg in (plot.wide, plot.narrow):
        for name in ("Vanilla ReLU", "ProSparse*", "in all of 8 consecutive tokens", "Zeros of ProSparse"):
            assert name in svg
    found = by_layer(plot.rows, "prosparse", "survivor_ratio")
    assert list(found) == [0, 1, 2, 3]
    live = [r for r in plot.rows if r["setting"] == "prosparse" and r["layer"] == 2]
    assert found[2] == pytest.approx(sum(r["mean_abs_live"] / 0.02 for r in live) / 3)
    assert "by chunks of 8 tokens" in plot.alt


def test_older_evaluations_say_so(tmp_path: Path) -> None:
    data = told(tmp_path, OldScribe)
    grid, plot = activations(data), survivors(data)
    assert grid is not None
    assert set(grid.notes) == {OLDER, NO_CHUNK}
    assert plot.paint is None
    assert "older" in plot.missing
    assert not plot.rows


def test_without_a_dense_model_there_is_no_ratio(tmp_path: Path) -> None:
    data = told(tmp_path, NoDenseScribe)
    grid, plot = activations(data), survivors(data)
    assert grid is not None
    assert set(grid.notes) == {NO_DENSE, NO_CHUNK}
    assert plot.paint is None


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    ledger, story = write_story(tmp_path, until="base_model")
    data = collect(ledger, story.run_id)
    assert activations(data) is None
    assert survivors(data).missing == "this run has no such evaluate step"
