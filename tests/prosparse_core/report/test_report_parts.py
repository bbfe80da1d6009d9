from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core.report import format as shown
from prosparse_core.report.courses import main_path
from prosparse_core.report.format import MINUS, SPACE
from prosparse_core.report.grid import Cell, Column, Grid, escaped
from prosparse_core.report.plot_training import smoothed, thinned

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.000"),
        (1040.39, "1,040"),
        (12.3456, "12.35"),
        (0.00012345, "0.0001234"),
        (-3.2, f"{MINUS}3.200"),
        (9.9999, "10.000"),
        (2.5e-7, f"2.50e{MINUS}7"),
        (0, "0"),
        (NAN, "n/a"),
        (None, "n/a"),
        (True, "n/a"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert shown.number(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.8934, "89.3"),
        (0.0, "0"),
        (1.0, "100"),
        (0.99999, "99.999"),
        (0.0001, "0.01"),
        (0.99999999, f">{SPACE}99.9999"),
        (1e-9, f"<{SPACE}0.0001"),
    ],
)
def test_pct_says_0_and_100_only_when_exact(fraction: float, text: str) -> None:
    assert shown.pct(fraction) == f"{text}{SPACE}%"
    assert shown.pct(None) == shown.pct(NAN) == "n/a"


def test_other_formats() -> None:
    assert shown.plain(0.05) == "0.05"
    assert shown.plain(100) == "100"
    assert shown.plain(0.0750) == "0.075"
    assert shown.spread(2.4, 0.048) == ("2.400", "± 0.048")
    assert shown.spread(1040.39, 8.44) == ("1,040.4", "± 8.4")
    assert shown.spread(1.5, None) == ("1.500", "")
    assert shown.ratio(2.966) == "2.97×"
    assert shown.ratio(0.012) == "0.012×"
    assert shown.duration(59.94) == f"59.9{SPACE}s"
    assert shown.duration(61) == f"1{SPACE}min 01{SPACE}s"
    assert shown.duration(3 * 3600 + 5 * 60) == f"3{SPACE}h 05{SPACE}min"
    assert shown.size(1536) == f"1.5{SPACE}KiB"
    assert shown.count(89_130_000_000) == f"89.1{SPACE}G"
    assert shown.when(datetime(2026, 1, 2, 3, 4)) == "2026-01-02 03:04 UTC"
    assert shown.clip("one  two\nthree", 8) == "one two…"
    assert shown.duration(None) == shown.size(NAN) == shown.when(None) == shown.short(None) == "n/a"


def test_a_grid_numbers_each_reason_once() -> None:
    grid = Grid("t", [Column("a", group="g"), Column("b", group="g"), Column("c")])
    assert [grid.missing(r).note for r in ("x", "y", "x")] == [1, 2, 1]
    assert grid.groups == [("g", 2), ("", 1)]
    grid.rows.append([Cell("1", "± 2\n3×"), grid.missing("x"), Cell("|")])
    assert grid.records() == [{"g: a": "1 ± 2 3×", "g: b": "n/a", "c": "|"}]
    assert "| 1 ± 2, 3× | n/a \\[1\\] | \\| |" in grid.markdown()
    assert grid.markdown().endswith("1. x\n2. y\n")


@given(st.text())
def test_escaped_markdown_has_no_markup_left(text: str) -> None:
    assert "<" not in escaped(text)
    assert "\n" not in escaped(text)


def test_a_run_that_trained_several_settings_shows_the_main_one() -> None:
    def rows(artifact: str) -> list[dict[str, Any]]:
        return [{"stage": s, "step": s, "artifact": f"{artifact}{s}"} for s in (0, 1)]

    subjects = {
        "training": [*rows("l1-"), *rows("ours-")],
        "checkpoints": [
            {"variant": "a", "setting": "fixed_l1", "checkpoint": "l1-1"},
            {"variant": "b", "setting": "prosparse", "checkpoint": "ours-1"},
            {"variant": "c", "setting": "mine", "checkpoint": "l1-1"},
        ],
        "lineage": [{"artifact": "ours-1", "input": "ours-0"}, {"artifact": "l1-1", "input": "l1-0"}],
    }
    assert {r["artifact"] for r in main_path(subjects)} == {"ours-0", "ours-1"}


FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, max_size=60), st.integers(0, 9))
def test_smoothing_is_the_mean_over_neighbours(values: list[float], reach: int) -> None:
    slow = []
    for i in range(len(values)):
        near = [v for j, v in enumerate(values) if abs(i - j) <= reach]
        slow.append(sum(near) / len(near))
    assert smoothed(values, reach) == pytest.approx(slow, abs=1e-6)


@given(st.lists(FLOATS, min_size=1, max_size=300), st.integers(4, 80))
def test_thinning_keeps_the_outline(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thinned(points, most)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert set(kept) <= set(points)
    assert [p[0] for p in kept] == sorted({p[0] for p in kept})
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)
    assert len(kept) <= max(most, 0) + 4
