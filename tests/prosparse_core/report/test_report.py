from __future__ import annotations

import csv
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from report_page import Page
from report_runs import Scribe, Story, write_story

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.ledger import Ledger
from prosparse_core.report import closing_tables, collect, write_data, write_report
from prosparse_core.report.data import ReportData
from prosparse_core.report.format import SPACE, pct, ratio, spread
from prosparse_core.report.page import examples, plots, render, tiles
from prosparse_core.report.tables import benchmarks, exported, results
from prosparse_core.report.tables_run import stages, steps

EVIL = "<script>alert('x')</script>"


class NoisyScribe(Scribe):
    """Everything that may be missing or not finite is."""

    def training(self, index: int) -> list[dict[str, Any]]:
        rows = super().training(index)
        for i, row in enumerate(rows):
            row["lm_loss"] = math.nan if i % 3 else row["lm_loss"]
            row["sparsity"] = None if i % 2 else math.inf
        return rows

    def evaluation(self, setting: str) -> list[dict[str, Any]]:
        facts = super().evaluation(setting)
        for fact in facts:
            if fact["table"] == "evaluations":
                fact |= {"value": math.nan, "stderr": None, "note": "no document was long enough"}
            if fact["table"] == "sparsity":
                fact |= {"dead_frac": None, "mean_abs_live": None, "chunk_sparsity": None}
        return facts

    def predictors(self) -> list[dict[str, Any]]:
        return [{**f, "recall": None} if f["table"] == "predictors" else f for f in super().predictors()]

    def speed(self) -> list[dict[str, Any]]:
        return [{**f, "rel_err": None, "byte_ratio": None} if f["table"] == "speed" else f for f in super().speed()]


class LayeredScribe(Scribe):
    """FFN times of two layers, one by one, and a sweep over random sparsities beside them."""

    def speed(self) -> list[dict[str, Any]]:
        facts = [self.variant("prosparse")]
        for layer, dense, sparse, limit in ((0, 100.0, 50.0, 2.0), (1, 300.0, 60.0, 6.0)):
            facts.append({**self.timing("ffn", "torch", dense, None), "layer": layer, "sparsity": 0.8 + layer / 10})
            facts.append({**self.timing("ffn", "native", sparse, limit), "layer": layer, "sparsity": 0.8 + layer / 10})
        for share in (0.5, 0.9):
            for provider, p50 in (("torch", 100.0), ("native", 100.0 * (1 - share))):
                fact = self.timing("ffn", provider, p50, 1 / (1 - share))
                facts.append({**fact, "sparsity": share, "mask_source": "random"})
        return facts


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "stopped_early": {"until": "stage1"},
    "nothing_measured": {"until": "base_model"},
    "failed": {"fails_at": "stage2", "error": f"ProSparseError: {EVIL} loss is not finite"},
    "failed_late": {"fails_at": "evaluate prosparse"},
    "still_running": {"is_ended": False, "until": "calibrate"},
    "one_layer_one_corpus": {"num_layers": 1, "corpora": ["code"], "stages": [{"until_step": 1, "l1": 0.0}]},
    "eighty_layers": {"num_layers": 80, "corpora": [f"corpus number {i} with a long name" for i in range(6)]},
    "evil_names": {
        "description": EVIL,
        "recipe": "a&b",
        "corpora": [EVIL, "a$b$c_{d}", "日本語 \u0001 x", '"q" & b'],
        "gates_pass": False,
    },
    "nothing_finite": {"scribe": NoisyScribe},
    "layer_by_layer": {"scribe": LayeredScribe, "has_stderr": False},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data of a case and its ledger, each made once."""
    made: dict[str, tuple[Ledger, Story, ReportData]] = {}

    def tell(case: str) -> tuple[Ledger, Story, ReportData]:
        if case not in made:
            ledger, story = write_story(tmp_path_factory.mktemp(case), **CASES[case])
            made[case] = (ledger, story, collect(ledger, story.run_id))
        return made[case]

    return tell


@pytest.fixture(scope="module")
def page_of(told: Any) -> Any:
    """The page of a case, rendered once."""
    return cache(lambda case: render(told(case)[2]))


@pytest.mark.parametrize("case", CASES)
def test_every_story_becomes_a_page_that_stands_alone(case: str, told: Any, page_of: Any) -> None:
    _, story, _data = told(case)
    html = page_of(case)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert not page.of("src")
    assert all(target.startswith("#") for target in page.of("href"))
    ids = page.of("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.of("href")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
    assert not re.search(r"@import|url\((?!#)", html)
    assert set(re.findall(r"https?://[^\"' <)]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "<script" not in html.lower()
    words = set(re.findall(r"[A-Za-z]+", page.text))
    assert not {"nan", "NaN", "None", "inf", "Undefined", "var"} & words
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert len(root.attrib["aria-label"]) > 20
        assert not {"#000000", "#ffffff"} & set(re.findall("#[0-9a-f]{6}", svg))
    assert story.run_id in page.text
    assert (case in ("failed", "failed_late")) == ("The way out: lower train.lr" in page.text)


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_says_why(case: str, told: Any) -> None:
    _, _, data = told(case)
    for plot in plots(data):
        assert plot.aid.endswith(".")
        assert plot.paint or len(plot.missing) > 15
        assert plot.alt.endswith(".") if plot.paint else not plot.wide
    grid = results(data)
    for cell in (cell for row in grid.rows for cell in row if cell.text == "n/a"):
        assert cell.note is not None
        assert grid.notes[cell.note - 1]
    assert [t.about for t in tiles(data) if t.value == "n/a" and not t.about] == []


def test_reasons_are_the_true_ones(told: Any) -> None:
    reasons = {case: told(case)[2].why_missing("evaluate", "prosparse") for case in CASES}
    assert reasons["stopped_early"] == "this run has no such evaluate step"
    assert reasons["failed"] == "the run failed before its evaluate step, at “stage 2 · lambda 0.5”"
    assert reasons["failed_late"] == "the step “evaluate · prosparse” failed"
    assert "recorded no such number" in told("whole")[2].why_missing("calibrate")
    noisy = told("nothing_finite")[2]
    assert "no document was long enough" in results(noisy).notes
    assert next(p for p in plots(noisy) if p.name == "predictor").missing.startswith("no layer had an active neuron")


def test_the_table_holds_what_the_ledger_holds(told: Any) -> None:
    ledger, story, data = told("whole")
    grid = results(data)
    names = [f"{c.group}/{c.title}" for c in grid.columns]
    rows = {row[0].text: dict(zip(names, row, strict=True)) for row in grid.rows}
    assert list(rows) == ["Original", "Vanilla ReLU", "ProSparse*", "ProSparse"]
    sql = f"SELECT * FROM leaderboard WHERE run_id = '{story.run_id}'"
    board = {r["setting"]: r for r in ledger.query(sql).records()}
    ours, dense = board["prosparse"], board["original"]
    assert rows["ProSparse"]["Sparsity/all"].text == pct(ours["sparsity"])
    together = rows["ProSparse"]["Token perplexity/all"]
    text, error = spread(ours["perplexity"], ours["perplexity_stderr"])
    assert (together.text, together.small) == (text, f"{error}\n{ratio(ours['perplexity'] / dense['perplexity'])}")
    assert rows["Original"]["Token perplexity/python-code"].text == "2.400"
    assert rows["Original"]["Token perplexity/python-code"].small == "± 0.048"
    assert rows["ProSparse"]["Token perplexity/python-code"].small == "± 0.048\n1.22×"
    for corpus in story.corpora:
        assert rows["ProSparse"][f"Sparsity/{corpus}"].text == pct(ours["sparsity_by_corpus"][corpus])
    assert rows["ProSparse"]["/Accuracy"].text == f"61.7{SPACE}%"
    assert rows["ProSparse"]["/Accuracy"].small == "± 6.3"
    assert [rows[s]["/Threshold"].text for s in ("ProSparse*", "ProSparse")] == ["–", "0.05"]
    assert [rows[s]["/Tokens seen"].text for s in ("Original", "ProSparse")] == ["0", "174,080"]
    assert not grid.notes


def test_calibration_text_stays_out_of_the_results(told: Any) -> None:
    _, _, data = told("whole")
    assert {r["setting"] for r in data["cliff"]} == {"original", "substituted"}
    assert all(r["task"] is None or not r["task"].startswith("calibration/") for r in data["scores"])
    assert "substituted" not in {s for s, _ in data.settings}


def test_the_check_of_the_export_is_no_benchmark(told: Any) -> None:
    _, story, data = told("whole")
    found = benchmarks(data)
    assert found is not None
    assert {row[0].text for row in found.rows} == {"function_choice"}
    check = exported(data)
    assert check is not None
    assert [row[0].text for row in check.rows] == sorted(story.corpora)
    assert exported(told("stopped_early")[2]) is None


def test_tiles_say_the_result(told: Any) -> None:
    found = {t.title: t for t in tiles(told("whole")[2])}
    assert found["as fast an FFN"].value == ratio(344 / 145)
    assert "native over our own dense kernel" in found["as fast an FFN"].about
    assert "byte ratio 2.47×" in found["as fast an FFN"].about
    assert found["the original's perplexity"].value == "1.22×"
    assert found["accuracy on function_choice"].about == f"± 6.3; original 63.3{SPACE}%"
    assert [t.value for t in tiles(told("failed")[2])] == ["n/a"] * 4


def test_a_failed_gate_is_never_a_bar(told: Any, page_of: Any) -> None:
    _, _, data = told("evil_names")
    rows = next(p for p in plots(data) if p.name == "speed").rows
    s3 = [r for r in rows if r["kernel"] == "s3"]
    assert [r["state"] for r in s3] == ["refused"]
    assert "speedup" not in s3[0]
    assert {r["state"] for r in rows if r["kernel"] != "s3"} == {"passed"}
    assert "no speed-up: failed the gate (relative error 0.030)" in Page(page_of("evil_names")).text


def test_recorded_masks_are_drawn_over_the_best_baseline(told: Any) -> None:
    rows = next(p for p in plots(told("whole")[2]) if p.name == "speed").rows
    assert {r["mask_source"] for r in rows} == {"recorded"}
    assert [(r["kernel"], r["baseline"]) for r in rows] == [
        ("s2", "native_dense"),
        ("s3", "native_dense"),
        ("ffn", "native_dense"),
        ("decode", "transformers_dense"),
    ]
    for row in rows:
        assert row["speedup_low"] < row["speedup"] < row["speedup_high"]


def test_layers_count_by_their_summed_times_and_sweeps_stay_apart(told: Any) -> None:
    _, _, data = told("layer_by_layer")
    recorded = [r for r in data["speedups"] if r["mask_source"] == "recorded"]
    assert [r["num_timings"] for r in recorded] == [2]
    assert recorded[0]["speedup"] == pytest.approx(400 / 110)
    assert recorded[0]["speedup_low"] == pytest.approx(400 * 0.96 / (110 * 1.07))
    assert recorded[0]["byte_ratio"] == pytest.approx(400 / (100 / 2 + 300 / 6))
    swept = [(r["sparsity"], r["speedup"]) for r in data["speedups"] if r["mask_source"] == "random"]
    assert swept == [(0.5, pytest.approx(2.0)), (0.9, pytest.approx(10.0))]


def test_cached_steps_show_as_such(told: Any, page_of: Any) -> None:
    _, story, data = told("whole")
    rows = steps(data).rows
    assert [row[1].text for row in rows if row[2].text == "cached"] == ["base model · example-model", "mixture"]
    assert all(re.fullmatch("[0-9a-f]{12}", row[5].text) for row in rows)
    assert rows[-1][7].text.startswith("before ")
    assert "15: 13 made, 2 found in the store" in Page(page_of("whole")).text
    grid = stages(data)
    assert grid is not None
    assert [row[1].text for row in grid.rows] == ["1–60", "61–80", "81–200", "201–340"]
    assert grid.rows[-1][2].text == f"{story.stages[-1]['until_step'] * 512:,}"


def test_the_same_ledger_gives_the_same_bytes(told: Any, tmp_path: Path) -> None:
    ledger, story, _ = told("whole")
    pages = [write_report(ledger, story.run_id, tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]
    assert len(pages[0]) < 1_000_000
    assert sorted(os.listdir(tmp_path)) == ["a.html", "b.html"]


def test_matplotlib_is_left_as_it_was(told: Any) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(told("stopped_early")[2])
    assert dict(matplotlib.rcParams) == before


def test_one_csv_per_plot_with_every_row(told: Any, tmp_path: Path) -> None:
    ledger, story, data = told("whole")
    paths = write_data(data, tmp_path / "data")
    assert [p.stem for p in paths] == ["training", "tradeoff", "layers", "survivors", "predictor", "speed", "curve"]
    with open(paths[0], encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    sql = f"SELECT step, lm_loss FROM loss_curve WHERE run_id = '{story.run_id}' ORDER BY step"
    assert [(int(r["step"]), float(r["lm_loss"])) for r in rows] == ledger.query(sql).rows
    seen = [
        (int(r["step"]), float(r["held_out_loss"]), float(r["held_out_sparsity"])) for r in rows if r["held_out_loss"]
    ]
    assert seen == [(int(r["step"]), 2.0, 0.75) for r in rows if int(r["step"]) % 40 == 0]
    assert seen
    (plot,) = [p for p in plots(data) if p.name == "training"]
    assert "The dots are held-out text" in plot.aid
    assert f"looked at {len(seen)} times" in plot.alt
    early = write_data(told("stopped_early")[2], tmp_path / "early")
    assert [p.name for p in early] == ["training.csv"]


def test_the_queries_shown_give_the_rows_drawn(told: Any) -> None:
    ledger, _, data = told("whole")
    for plot in plots(data):
        assert len(ledger.query(plot.sql)) >= len(plot.rows) > 0
    for question, sql in examples(data):
        assert len(ledger.query(sql)) > 0, question


def test_only_the_run_asked_for(tmp_path: Path) -> None:
    write_story(tmp_path)
    ledger, other = write_story(tmp_path, run_id="20260102T000000-example-0002", until="calibrate", num_layers=2)
    data = collect(ledger, other.run_id)
    assert not data["layers"]
    assert not data["scores"]
    assert len(data["training"]) == 340
    assert {r["run_id"] for r in ledger.query("FROM runs").records()} == {Story.run_id, other.run_id}


@pytest.mark.parametrize("run_id", ["nobody", "x'; DROP TABLE runs; --", ""])
def test_an_unknown_run_is_bad_input(run_id: str, told: Any, tmp_path: Path) -> None:
    ledger, _, _ = told("stopped_early")
    with pytest.raises(BadInput, match="no run"):
        write_report(ledger, run_id, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written_changes_nothing(told: Any, tmp_path: Path) -> None:
    ledger, story, _ = told("stopped_early")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_report(ledger, story.run_id, tmp_path / "file" / "r.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_report(ledger, story.run_id, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_closing_tables_are_markdown_that_stays_text(told: Any) -> None:
    tables = {key: (text, rows) for key, text, rows in closing_tables(told("evil_names")[2])}
    assert list(tables) == ["results", "predictors", "speed"]
    for text, rows in tables.values():
        assert "<script" not in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(rows)
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert all(isinstance(v, str) and "\n" not in v for row in rows for v in row.values())
    assert [key for key, _, _ in closing_tables(told("failed")[2])] == ["results"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_real_browser_shows_it(width: int, told: Any, tmp_path: Path) -> None:
    from PIL import Image

    ledger, story, _ = told("whole")
    page = write_report(ledger, story.run_id, tmp_path / "report.html")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
    places = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    command = ["chromium", *flags.split(), *places, f"--window-size={width},6000", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as image:
        assert image.size[0] == width
        colors = image.convert("RGB").getcolors(1 << 24)
        margin = image.convert("RGB").crop((width - 12, 0, width, 6000)).getcolors(1 << 16)
    assert colors is not None
    assert len(colors) > 500
    assert margin is not None
    assert len(margin) == 1, "something reaches into the right margin: the page scrolls sideways"
