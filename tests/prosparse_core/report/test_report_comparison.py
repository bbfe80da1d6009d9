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
from prosparse_core.report.plot_comparison import arm_line, fixed_line, log_ticks, style_of
from prosparse_core.report.tables import benchmarks, results
from prosparse_core.report.tables_claim import caveats, matched, verdict
from prosparse_core.report.tables_compare import comparison, paper, rules
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
    assert verdict(found).startswith("This run cannot tell whether at matched sparsity")
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


def test_the_table_says_how_the_arms_differ(data: ReportData) -> None:
    """Two of one perplexity may have had another sum of lambda, and another learning rate to settle at."""
    grid = comparison(data)
    rows = {(row[0].text, row[1].text): [cell.text for cell in row[-4:]] for row in grid.rows}
    assert [c.title for c in grid.columns[-4:]] == ["Sum over steps", "Steps at the last", "Of the peak", "Of its sum"]
    assert rows["ProSparse*", "1"] == ["4", "4", f"100{SPACE}%", f"100{SPACE}%"]
    assert rows["Fixed L1", "0.3"][:2] == ["1.2", "4"]
    assert rows["Original", "–"] == rows["Vanilla ReLU", "0"] == ["–"] * 4
    torn = [{**r, "l1_sum": None} for r in data["comparison"]]
    grid = comparison(altered(data, comparison=torn))
    [star] = [row for row in grid.rows if row[0].text == "ProSparse*"]
    assert star[-1].text == "n/a"
    assert grid.notes[(star[-1].note or 0) - 1] == "the training log does not tell of every step"


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


def test_a_progressive_arm_of_several_factors_is_a_line_too(data: ReportData) -> None:
    assert arm_line(data["comparison"], "prosparse_star") == [], "one factor is a point"
    [star] = [r for r in data["comparison"] if r["setting"] == "prosparse_star"]
    line = arm_line([*data["comparison"], {**star, "l1": 0.5, "sparsity": 0.7}], "prosparse_star")
    assert [(s, l1) for s, _, l1 in line] == [(pytest.approx(0.6), 0.0), (0.7, 0.5), (pytest.approx(0.86), 1.0)]
    shifted = [{**star, "setting": "prosparse", "l1": l1, "sparsity": s} for l1, s in ((0.5, 0.9), (1.0, 0.95))]
    assert [l1 for *_, l1 in arm_line([*data["comparison"], *shifted], "prosparse")][-2:] == [0.5, 1.0]
    assert 0.0 not in [l1 for *_, l1 in arm_line([*data["comparison"], *shifted], "prosparse")], (
        "no plain ReLU with one"
    )


@given(st.floats(1e-3, 1e6), st.floats(1.02, 1e6))
def test_ticks_lie_on_the_axis_and_are_few(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert all(low * (1 - 1e-9) <= t <= low * factor * (1 + 1e-9) for t in ticks)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 14


STAR = {
    "setting": "prosparse_star",
    "measured": "progressive",
    "variant": "v",
    "l1": 1.0,
    "sparsity": 0.87,
    "perplexity": 4.0,
    "fixed_perplexity": 4.2,
    "difference_pct": -4.8,
    "difference_low_pct": -6.8,
    "difference_high_pct": -2.8,
    "num_pairs": 3,
    "seeds": [1, 2, 42],
    "l1_below": 0.3,
    "l1_above": 0.8,
    "no_interval": None,
    "reason": None,
}
NOT_KNOWN = {
    "difference_low_pct": None,
    "difference_high_pct": None,
    "num_pairs": 1,
    "no_interval": "one pair of seeds",
}
ABSENT = {**NOT_KNOWN, "difference_pct": None, "fixed_perplexity": None, "num_pairs": 0, "reason": "too sparse"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "In an 8-step transient (4 regularized steps, 4,096 tokens): against a fixed factor"),
        ({}, "the perplexity of ProSparse* is −4.8 % at 87.0 % (95 % interval −6.8 % to −2.8 %, 3 pairs of seeds)."),
        ({}, "Of one interval 1 lies below 0; that is a statement about trainings of this length alone."),
        ({"difference_pct": 4.8, "difference_low_pct": 2.8, "difference_high_pct": 6.8}, "one interval 1 lies above 0"),
        ({"difference_high_pct": 1.1}, "Of one interval 1 holds it; that is"),
        (NOT_KNOWN, "−4.8 % at 87.0 % (no interval: 1 pair of seeds). Without two pairs of seeds this decides"),
        (ABSENT, "This run cannot tell whether at matched sparsity progressive regularization has a lower perplexity "
                 "than a fixed factor: too sparse."),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(data: ReportData, change: dict[str, Any], said: str) -> None:
    sentence = verdict(altered(data, matched=[{**STAR, **change}])).replace(SPACE, " ")
    assert said in sentence
    assert sentence.endswith(".")
    assert "contradict" not in sentence, "what a short run finds says nothing of the paper's long ones"


def test_the_verdict_tells_of_every_factor_and_of_thresholds(data: ReportData) -> None:
    more = [
        {**STAR, "l1": 0.5, "sparsity": 0.8, "difference_low_pct": -1.0, "difference_high_pct": 1.0},
        {
            **STAR,
            "measured": "fixed",
            "l1": 0.8,
            "sparsity": 0.83,
            "difference_low_pct": 1.0,
            "difference_high_pct": 3.0,
        },
        {**STAR, "setting": "prosparse", "sparsity": 0.93},
        {**STAR, "setting": "linear_ramp", "sparsity": 0.99},
    ]
    sentence = verdict(altered(data, matched=[STAR, *more])).replace(SPACE, " ")
    assert [f"at {zeros} %" in sentence for zeros in ("80.0", "87.0", "83.0", "93.0", "99.0")] == [True] * 4 + [False]
    assert "the perplexity of ProSparse is −4.8 % at 93.0 %" in sentence
    assert "Of 4 intervals 2 lie below 0, 1 lies above 0 and 1 holds it;" in sentence


def test_the_page_says_what_the_interval_does_not(data: ReportData) -> None:
    """Of the made-up comparison: arms that end at different factors, a shared stage 0, thresholds on one side."""
    said = [line.replace(SPACE, " ") for line in caveats(data)]
    assert said == [
        "The arms end at different λ: 1 against 0.3 and 0.8.",
        "When λ reaches its last value, 100 % of the learning rate, summed over the regularized steps, is left to the "
        "progressive stages (4 steps), 100 % to a fixed factor (4 steps).",
        "Thresholds were calibrated for one arm only.",
        "Seeds share stage 0: what they repeat is only what comes after it.",
        "All settings read the same held-out text; how far other text would move a difference is in no interval.",
    ]
    lines = [r for r in data["comparison"] if r["setting"] != "prosparse_star"]
    fair = [{**r, "setting": "prosparse_star"} for r in lines if r["setting"] == "fixed_l1"]
    shifted = [{**r, "setting": "fixed_l1_fatrelu"} for r in fair]
    ends = [{**c, "seed": 42} for c in data["checkpoints"]]
    found = caveats(altered(data, comparison=[*lines, *fair, *shifted], checkpoints=ends))
    assert found[0] == "Both arms end at λ 0.3 and 0.8."
    assert not [line for line in found if "one arm only" in line or "share" in line]


def test_a_matched_row_that_needs_extrapolation_is_not_a_number(tmp_path: Path) -> None:
    rows = [Row("vanilla_relu", (5.0, 5.0), 0.6, 0.0), Row("fixed_l1", (6.0, 6.0), 0.7, 0.3)]
    ledger = Ledger(tmp_path)
    write_rows(ledger, "r", *rows, Row("prosparse_star", (6.0, 6.0), 0.8, 1.0))
    found = collect(ledger, "r")
    grid = matched(found)
    told = [cell.text.replace(SPACE, " ") for cell in grid.rows[0]]
    assert told == ["ProSparse*", "ProSparse* λ 1", "80.00 %", "6.000", "n/a", "n/a", "n/a", "0", "n/a"]
    assert grid.notes == [
        "its sparsity of 80.00 % is above the most of the fixed factors, 70.00 %: that would be extrapolation"
    ]
    assert verdict(found).endswith(grid.notes[0] + ".")
    assert {t.about for t in tiles(found)} >= {grid.notes[0]}


def test_a_single_pair_has_a_difference_and_no_interval(data: ReportData) -> None:
    grid = matched(altered(data, matched=[{**STAR, **NOT_KNOWN}]))
    told = [cell.text.replace(SPACE, " ") for cell in grid.rows[0]]
    assert told == ["ProSparse*", "ProSparse* λ 1", "87.00 %", "4.000", "4.200", "−4.8 %", "n/a", "1", "0.3 and 0.8"]
    assert grid.notes == ["one pair of seeds"]


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
    assert grid.notes == ["the paper does not treat example-model, Q4_1 dequantised: llama2-7b stands beside it"]


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
