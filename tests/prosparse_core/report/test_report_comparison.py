"""The report of a comparison: a row per factor and seed, every course of training, a verdict whichever way it falls."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from compare_runs import ROWS, Row, write_comparison, write_rows
from hypothesis import given
from hypothesis import strategies as st
from report_page import Page

from prosparse_core.ledger import Ledger
from prosparse_core.report import collect
from prosparse_core.report.courses import courses, grouped, main_path
from prosparse_core.report.data import ReportData
from prosparse_core.report.format import SPACE
from prosparse_core.report.names import SETTINGS
from prosparse_core.report.page import plots, render, summary, tiles
from prosparse_core.report.plot_comparison import fixed_line, log_ticks, style_of
from prosparse_core.report.tables import benchmarks, results
from prosparse_core.report.tables_compare import comparison, interval, matched, paper, rules, verdict
from prosparse_core.report.tables_layers import activations


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    ledger, told = write_comparison(tmp_path_factory.mktemp("compare"))
    return collect(ledger, told.run_id)


def altered(data: ReportData, **subjects: list[dict[str, Any]]) -> ReportData:
    return dataclasses.replace(data, subjects={**data.subjects, **subjects})


def test_the_page_of_a_comparison_stands_alone(data: ReportData) -> None:
    html = render(data)
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    ids = page.of("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.of("href")} <= set(ids)
    assert not {"nan", "NaN", "None", "inf"} & set(re.findall("[A-Za-z]+", page.text))
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert verdict(data) in page.text.replace("\n", " ") or verdict(data) in page.text
    headings = re.findall(r"<h2><span>(\d+)</span> ([^<]*)</h2>", html)
    assert [int(number) for number, _ in headings] == list(range(1, len(headings) + 1))
    assert headings[0][1] == "Comparison"
    assert not {"Activation predictor", "Speed"} & {title for _, title in headings}, "a comparison has no such steps"


def test_a_run_of_the_main_path_has_no_comparison(data: ReportData) -> None:
    found = dataclasses.replace(data, run={**data.run, "flow": "prosparse"})
    assert not found.is_comparison
    assert [key for key, _ in summary(found)] == ["results"]
    assert not {"comparison", "courses"} & {plot.name for plot in plots(found)}
    assert "</span> Comparison<" not in render(found)


def test_rows_of_one_setting_are_told_apart(data: ReportData) -> None:
    names = [(row[0].text, row[0].small) for row in results(data).rows]
    assert names == [
        ("Original", "dense activation"),
        ("Vanilla ReLU", "ReLU, no regularization"),
        ("Fixed L1", "λ 0.3, seed 42"),
        ("Fixed L1", "λ 0.3, seed 1"),
        ("Fixed L1", "λ 0.8, seed 42"),
        ("ProSparse*", "seed 42"),
        ("ProSparse*", "seed 1"),
        ("ProSparse", "seed 42"),
        ("ProSparse", "seed 1"),
        ("Closed loop", "lambda steered to a target sparsity"),
    ]
    left = activations(data)
    assert left is not None
    assert [(row[0].text, row[0].small) for row in left.rows] == names
    grid = benchmarks(data)
    assert grid is not None
    titles = [column.title for column in grid.columns]
    assert len(set(titles)) == len(titles) == 12
    assert "Fixed L1, λ 0.3, seed 1" in titles


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        ("compare", ("original", "vanilla_relu", "fixed_l1", "prosparse_star", "prosparse", "closed_loop")),
        ("prosparse", ("original", "vanilla_relu", "prosparse_star", "prosparse")),
        ("evaluate", ()),
    ],
)
def test_what_is_expected_depends_on_the_flow(data: ReportData, flow: str, expected: tuple[str, ...]) -> None:
    assert dataclasses.replace(data, run={**data.run, "flow": flow}).expected == expected


def test_an_expected_setting_that_is_missing_says_why(tmp_path: Path) -> None:
    settings = ("vanilla_relu", "prosparse_star", "drelu")
    ledger, told = write_comparison(tmp_path, rows=ROWS[1:2], settings=settings, with_thresholds=False)
    found = collect(ledger, told.run_id)
    for grid in (comparison(found), results(found)):
        rows = {row[0].text: row for row in grid.rows}
        assert set(rows) == {"Vanilla ReLU", "ProSparse*", "dReLU"}
        note = rows["dReLU"][4].note
        assert note is not None
        assert grid.notes[note - 1] == "this run has no such evaluate step"
    assert matched(found).rows == []
    assert verdict(found).startswith("This run cannot test the paper's claim")
    assert rules(found) is None
    assert [t.value for t in tiles(found)] == ["n/a"] * 4


def test_the_table_of_the_comparison(data: ReportData) -> None:
    grid = comparison(data)
    names = [f"{c.group}/{c.title}" for c in grid.columns]
    rows = {(row[0].text, row[1].text): dict(zip(names, row, strict=True)) for row in grid.rows}
    star, fixed = rows["ProSparse*", "1"], rows["Fixed L1", "0.8"]
    assert star["/Setting"].small == "2 training runs"
    assert (star["/Seeds"].text, fixed["/Seeds"].text) == ("1, 42", "42")
    [line] = [r for r in data["comparison"] if r["setting"] == "prosparse_star"]
    assert float(star["Perplexity/Mean"].text) == pytest.approx(line["perplexity"], abs=0.005)
    assert float(star["Perplexity/Mean"].small.removeprefix("± ")) == pytest.approx(line["perplexity_sd"], abs=0.005)
    assert fixed["Perplexity/Mean"].small == "", "one seed has no spread"
    assert (star["/Sparsity"].text, star["/Sparsity"].small) == (f"86.00{SPACE}%", "± 1.41")
    assert rows["Original", "–"]["Perplexity/Ratio to the original"].text == "1.00×"
    assert rows["ProSparse", "1"]["/Threshold"].text == "0.02"


def test_the_tables_shown_with_prefect_keep_every_row(data: ReportData) -> None:
    found = dict(summary(data))
    assert list(found) == ["comparison", "results"]
    for grid in found.values():
        assert len(grid.records()) == len(grid.rows)
        assert len(grid.records()[0]) == len(grid.columns)


def test_every_course_is_drawn_with_its_shared_beginning(data: ReportData) -> None:
    by_course = grouped(data["courses"])
    trained = [(r.setting, r.l1, r.seed) for r in ROWS if r.tokens]
    assert set(by_course) == set(trained), "with thresholds or without, it is one course"
    for (setting, l1, seed), rows in by_course.items():
        assert [r["step"] for r in rows] == list(range(1, 9)), "stage 0 belongs to all of them"
        [row] = [r for r in ROWS if (r.setting, r.l1, r.seed) == (setting, l1, seed)]
        assert rows[-1]["sparsity"] == pytest.approx(row.sparsity)
    assert {r["stage"] for r in data["training"]} == {0, 1}
    assert data["training"][-1]["sparsity"] == pytest.approx(0.85), "the recipe's seed stands for the run"
    assert len(data["training"]) == 8


def test_what_is_only_a_beginning_is_no_course() -> None:
    subjects = {
        "training": [{"artifact": a, "stage": s, "step": s} for a, s in (("zero", 0), ("one", 1))],
        "checkpoints": [
            {"variant": "a", "setting": "vanilla_relu", "checkpoint": "zero"},
            {"variant": "b", "setting": "prosparse_star", "checkpoint": "one"},
            {"variant": "c", "setting": "original", "checkpoint": "base"},
        ],
        "lineage": [{"artifact": "one", "input": "zero"}, {"artifact": "zero", "input": "base"}],
    }
    assert list(grouped(courses(subjects))) == [("prosparse_star", None, None)]
    assert main_path(subjects) == subjects["training"]


def test_the_plot_shows_every_variant(data: ReportData) -> None:
    found = {plot.name: plot for plot in plots(data)}
    plot = found["comparison"]
    assert len(plot.rows) == len(ROWS) + 2
    assert plot.paint is not None
    assert "Original (not sparse) at 3.364" in plot.alt
    svg = ElementTree.fromstring(plot.wide)
    text = " ".join(node.text or "" for node in svg.iter("{http://www.w3.org/2000/svg}text"))
    for name in ("better", "λ 0.3", "λ 0.8", "ProSparse*", "Fixed L1", "Original, not sparse: 3.364"):
        assert name in text
    assert {r["seed"] for r in found["courses"].rows} == {42, 1}
    assert "its factors or seeds" in found["courses"].aid


def test_no_two_settings_look_alike() -> None:
    assert len({style_of(s) for s in [*SETTINGS, "relullama"]}) == len(SETTINGS) + 1


def test_the_line_of_fixed_factors_begins_with_plain_relu(data: ReportData) -> None:
    line = fixed_line(data["comparison"])
    assert [l1 for _, _, l1 in line] == [0.0, 0.3, 0.8]
    assert [s for s, _, _ in line] == pytest.approx([0.6, 0.81, 0.9])
    assert fixed_line([r for r in data["comparison"] if r["setting"] != "fixed_l1"]) == []


@given(st.floats(1e-3, 1e6), st.floats(1.02, 1e6))
def test_ticks_lie_on_the_axis_and_are_few(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert all(low * (1 - 1e-9) <= t <= low * factor * (1 + 1e-9) for t in ticks)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 14


STAR = {
    "setting": "prosparse_star",
    "variant": "v",
    "sparsity": 0.87,
    "perplexity": 4.0,
    "fixed_perplexity": 4.2,
    "difference_pct": -4.8,
    "difference_stderr_pct": 1.0,
    "error_source": "seeds",
    "degrees_of_freedom": None,
    "reason": None,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "4.8 % lower than the 4.200 of a fixed factor (difference −4.8 % ± 1.0, one standard error from the"),
        ({}, "95 % interval −6.8 % to −2.8 %): this run supports the paper's claim that at matched sparsity"),
        ({"difference_pct": 4.8}, "4.8 % higher than the 4.200 of a fixed factor"),
        ({"difference_pct": 4.8}, "this run contradicts the paper's claim"),
        ({"difference_stderr_pct": 3.0}, "interval −10.7 % to +1.1 %): this run does not decide the paper's claim"),
        ({"degrees_of_freedom": 1}, "interval −17.5 % to +7.9 %): this run does not decide"),
        ({"degrees_of_freedom": 1.57}, "interval −10.5 % to +0.9 %): this run does not decide"),
        ({"degrees_of_freedom": 11}, "interval −7.0 % to −2.6 %): this run supports"),
        ({"difference_pct": 0.0}, "is the same as the 4.200 of a fixed factor"),
        ({"difference_stderr_pct": None}, "without a standard error that neither supports nor refutes"),
        ({"reason": "too sparse", "difference_pct": None}, "cannot test the paper's claim that at matched"),
        ({"reason": "too sparse", "difference_pct": None}, "than a fixed factor: too sparse."),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(data: ReportData, change: dict[str, Any], said: str) -> None:
    sentence = verdict(altered(data, matched=[{**STAR, **change}])).replace(SPACE, " ")
    assert said in sentence
    assert sentence.endswith(".")
    assert sentence.count("this run") + sentence.count("This run") + sentence.count("neither") == 1


def test_the_interval_widens_with_few_seeds() -> None:
    """Against the printed tables of Student's t; without a count of freedom the error counts as known."""
    widths = [interval({**STAR, "degrees_of_freedom": k})[1] - STAR["difference_pct"] for k in (1, 2, 3, 10, 30, None)]
    assert widths == pytest.approx([12.706, 4.303, 3.182, 2.228, 2.042, 1.960], abs=6e-4)


def test_a_matched_row_that_needs_extrapolation_is_not_a_number(tmp_path: Path) -> None:
    rows = [Row("vanilla_relu", (5.0, 5.0), 0.6, 0.0), Row("fixed_l1", (6.0, 6.0), 0.7, 0.3)]
    ledger = Ledger(tmp_path)
    write_rows(ledger, "r", *rows, Row("prosparse_star", (6.0, 6.0), 0.8, 1.0))
    found = collect(ledger, "r")
    grid = matched(found)
    assert [cell.text for cell in grid.rows[0][3:]] == ["n/a"] * 4
    assert grid.notes == [
        "its sparsity of 80.00 % is above the most of the fixed factors, 70.00 %: that would be extrapolation"
    ]
    assert verdict(found).endswith(grid.notes[0] + ".")
    assert {t.about for t in tiles(found)} >= {grid.notes[0]}


def test_rules_stand_beside_each_other(data: ReportData) -> None:
    """Within 1 %: 0.9 t allows 0.01 for all layers, 0.4 t allows 0.02 per layer."""
    grid = rules(data)
    assert grid is not None
    told = [[cell.text.replace(SPACE, " ") for cell in row] for row in grid.rows]
    assert told[0][:7] == ["one for all layers", "0.01", "86.00 %", "4.036", "+0.9 %", "the budget", "no"]
    saturated = "sparsity, which larger thresholds do not raise"
    assert told[1] == ["one per layer", "0.02", "87.00 %", "4.032", "+0.8 %", saturated, "yes", "+1.0 %", "87.00 %"]
    assert [cell.text for cell in grid.rows[0][7:]] == ["n/a", "n/a"]
    assert grid.notes == ["only the thresholds that were taken are evaluated on held-out text"]


def test_beside_the_paper_each_number_names_its_table(data: ReportData) -> None:
    grid = paper(data)
    assert grid is not None
    rows = {(row[0].text, row[0].small): row for row in grid.rows if row[1].text == "sparsity"}
    assert set(rows) == {
        ("Vanilla ReLU", ""), ("Fixed L1", "λ 0.3"), ("Fixed L1", "λ 0.8"), ("ProSparse*", ""), ("ProSparse", "")
    }  # fmt: skip
    assert rows["ProSparse*", ""][2].text == f"85.00{SPACE}%"
    assert rows["ProSparse*", ""][3].text == f"88.11{SPACE}%"
    assert rows["ProSparse*", ""][5].text == "arXiv 2402.13516 Table 1"
    assert grid.notes == ["the paper does not treat example-model: llama2-7b stands beside it"]


def test_a_benchmark_that_could_not_be_run_says_why(tmp_path: Path) -> None:
    rows = (dataclasses.replace(ROWS[1], accuracy=None, stderr=None),)
    ledger = Ledger(tmp_path)
    write_rows(ledger, "r", *rows)
    grid = comparison(collect(ledger, "r"))
    [row] = grid.rows
    reasons = [grid.notes[cell.note - 1] for cell in row if cell.note]
    assert reasons == [
        "the evaluation recorded no standard error of every corpus",
        "the original's perplexity or this one was not measured",
        "function_choice: no held-out code with a docstring",
    ]
