"""The results page: from the ledger alone, the same bytes each time, all of it or nothing."""

from __future__ import annotations

import os
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from compare_runs import Comparison, write_comparison
from report_runs import write_story

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.ledger import Ledger
from prosparse_core.report import collect, write_results
from prosparse_core.report.data import ReportData
from prosparse_core.report.format import SPACE
from prosparse_core.report.markdown import _replace, commands, page, standalone
from prosparse_core.report.tables_claim import caveats, verdict

LONG = "20260103T120000-example-long-0003"
COMPARED = Comparison.run_id
FIGURES = ["comparison.svg", "course.svg", "courses.svg", "thresholds.svg"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Comparison]:
    """One ledger with a comparison and a long run of the main path."""
    home = tmp_path_factory.mktemp("results")
    ledger, comparison = write_comparison(home)
    write_story(home, run_id=LONG, num_layers=2, corpora=["code"], steps_logged_every=4)
    return ledger, comparison


@pytest.fixture(scope="module")
def written(told: tuple[Ledger, Comparison], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    paths = write_results(told[0], [told[1].run_id, LONG], folder)
    assert paths == [folder / "results.md", *(folder / "results" / name for name in FIGURES)]
    return folder


@pytest.fixture(scope="module")
def data(told: tuple[Ledger, Comparison]) -> ReportData:
    return collect(told[0], told[1].run_id)


def test_the_page_has_everything(data: ReportData, written: Path) -> None:
    text = (written / "results.md").read_text(encoding="utf-8")
    assert re.findall("^#+ .*", text, flags=re.MULTILINE) == [
        "# Results: example-model, Q4\\_1 dequantised",
        "## What was found",
        "## Every setting, and the tokens it saw",
        "## Progressive against fixed factors",
        "## Training",
        "## The run of example",
        "## One threshold for all layers, or one per layer",
        "## Beside the paper",
        "## Corpus by corpus",
        "## Conditions",
        "## Limits",
        "## How to reproduce this",
    ]
    assert verdict(data).replace("*", "\\*").replace(SPACE, " ") in text
    for line in caveats(data):
        assert f"- {line}".replace(SPACE, " ") in text
    assert "- The original is example-model, Q4\\_1 dequantised: what training gains" in text
    assert "| Model | example-model, Q4\\_1 dequantised |" in text
    assert "contradict" not in text, "a run of 8 steps says nothing of the paper's"
    assert "Training tokens per setting: 4,096; what holds so early need not hold later." in text
    assert "One seed, so no spread over seeds: Vanilla ReLU, Fixed L1 λ 0.8, Closed loop." in text
    assert "Up to 2 seeds: Fixed L1 λ 0.3, ProSparse\\*, ProSparse; a standard deviation over so few" in text
    assert "| llama2-7b | Fixed L1, constant lambda=0.1 after stage 0, with threshold | 88.62 % | 36.34 % |" in text
    assert "| Held-out tokens | code 1,000, docs 3,000 | " in text
    assert "arXiv 2402.13516 Table 1" in text
    assert not {"None", "nan", "NaN", "inf"} & set(re.findall("[A-Za-z]+", text))


def test_every_figure_is_there_and_whole(written: Path) -> None:
    text = (written / "results.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[(.*)\]\((results/[^)]*)\)", text)
    assert sorted(name.removeprefix("results/") for _, name in linked) == sorted(os.listdir(written / "results"))
    for alt, name in linked:
        assert len(alt) > 40
        svg = (written / name).read_text(encoding="utf-8")
        root = ElementTree.fromstring(svg)
        assert float(root.attrib["width"]) > 900
        assert "var(" not in svg, "a file of its own has no page to take colours from"
        assert set(re.findall(r'(?:href|src)="([^"]*)"', svg)) <= {f"#{i}" for i in re.findall(r'id="([^"]*)"', svg)}


def test_tables_are_tables(written: Path) -> None:
    text = (written / "results.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_the_same_ledger_gives_the_same_bytes_and_what_is_stale_goes(
    told: tuple[Ledger, Comparison], data: ReportData, written: Path, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    for name in ("mine.svg", "course.svg", "course-2.svg"):
        (tmp_path / "results" / name).write_text("old")
    paths = write_results(told[0], [], tmp_path)
    assert [p.name for p in paths] == ["results.md", "comparison.svg", "courses.svg", "thresholds.svg"]
    for path in paths[1:]:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["results", "results.md"], "nothing else is left behind"
    assert sorted(os.listdir(tmp_path / "results")) == ["comparison.svg", "courses.svg", "mine.svg", "thresholds.svg"]
    assert page(data)[0] == paths[0].read_text(encoding="utf-8")
    assert "The run of" not in paths[0].read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_written_stays_text_and_commands_words(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> | **bold** [a](b)\n\n# heading"
    overrides = ["x=```", "data.sources.0.name=a b; rm -rf `x`"]
    run_id = "a run's id"
    rows = (*Comparison().rows[:3], Comparison().rows[5])
    ledger, told = write_comparison(tmp_path, description=evil, overrides=overrides, run_id=run_id, rows=rows)
    data = collect(ledger, told.run_id)
    text, figures = page(data)
    assert "<script" not in text
    assert "\\*\\*bold\\*\\*" in text
    assert "\n# heading" not in text
    assert "\n````sh\n" in text
    assert text.rstrip().endswith("\n````")
    assert all("<script" not in svg for svg in figures.values())
    lines = commands([data])
    assert shlex.split(lines[0])[3:] == ["--set", overrides[0], "--set", overrides[1]]
    assert shlex.split(lines[1]) == ["prosparse", "report", run_id, "--markdown", "docs"]
    for line in lines[2:]:
        verb, name, sql = shlex.split(line)
        assert (verb, name) == ("prosparse", "query")
        assert len(ledger.query(sql)) > 0


@pytest.mark.slow
def test_a_comparison_without_thresholds_or_training_says_so(tmp_path: Path) -> None:
    rows = tuple(r for r in Comparison().rows if r.setting == "original")
    ledger, told = write_comparison(tmp_path, rows=rows, with_thresholds=False)
    text, figures = page(collect(ledger, told.run_id))
    assert figures == {}
    assert text.count("n/a: ") == 6, "three figures, the progressive settings, the rules and the paper"
    assert "Fixed L1 is missing: this run has no such evaluate step." in text


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["nobody"], "no run 'nobody'"),
        (["compared", "nobody"], "no run 'nobody'"),
        ([LONG], "0 of the 1 runs given are comparisons"),
        (["compared", "compared"], "2 of the 2 runs given are comparisons"),
    ],
)
def test_bad_input_writes_nothing(told: tuple[Ledger, Comparison], tmp_path: Path, runs: Any, message: str) -> None:
    given = [told[1].run_id if run_id == "compared" else run_id for run_id in runs]
    with pytest.raises(BadInput, match=message):
        write_results(told[0], given, tmp_path / "docs")
    assert not list(tmp_path.iterdir())


def test_no_finished_comparison_is_bad_input(tmp_path: Path) -> None:
    ledger, _ = write_story(tmp_path, until="base_model")
    with pytest.raises(BadInput, match="no finished comparison"):
        write_results(ledger, [], tmp_path / "docs")


def test_a_folder_that_cannot_be_written_keeps_the_old_page(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("old")
    (tmp_path / "results").write_text("a file in the way")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        _replace(tmp_path, "results.md", "new", {"comparison.svg": "new"})
    assert sorted(os.listdir(tmp_path)) == ["results", "results.md"]
    assert (tmp_path / "results.md").read_text() == "old"


def test_the_commands_of_a_page_read_well(data: ReportData) -> None:
    lines = commands([data])
    assert lines[0] == "prosparse compare example-compare --set 'compare.fixed_l1=[0.3, 0.8]'"
    assert lines[2] == f"prosparse query \"FROM comparison WHERE run_id = '{data.run['run_id']}'\""


def test_a_figure_of_its_own_has_paper_and_margins() -> None:
    svg = '<svg viewBox="0 0 920 590" role="img"><path style="fill: var(--ink, #23262b)"/></svg>'
    root = ElementTree.fromstring(standalone(svg))
    assert root.attrib["viewBox"] == "-16 -16 952 622"
    assert (root.attrib["width"], root.attrib["height"]) == ("952", "622")
    assert [child.tag for child in root] == ["rect", "path"]
    assert root[1].attrib["style"] == "fill: #23262b"
