"""The published numbers: counted, and checked against sums that no single wrong digit survives."""

from __future__ import annotations

import pytest
from ledger_fixture import (
    Home,
    ask,
    shared_home,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return shared_home(tmp_path_factory)


def test_published_rows_per_source(home: Home) -> None:
    rows = dict(ask(home, "SELECT replace(source, 'arXiv 2402.13516 ', ''), count(*) FROM published GROUP BY ALL"))
    assert rows == {
        "Table 1": 96,
        "Table 2": 62,
        "Table 3": 110,
        "Table 4": 12,
        "Table 5": 16,
        "Table 8": 80,
        "Table 9": 20,
        "ProSparse-LLaMA-2-7B model card, early revision": 41,
    }
    grouped = "FROM published GROUP BY model, setting, metric, condition, source"
    sql = f"SELECT model, setting, metric {grouped} HAVING count(*) > 1"
    assert ask(home, sql) == []


def test_published_averages_are_the_means_of_their_columns(home: Home) -> None:
    sql = """
      SELECT p.model, p.setting, avg(p.value) AS mean, any_value(a.value) AS average FROM published p
      JOIN published a ON (a.model, a.setting, a.source) = (p.model, p.setting, p.source) AND a.metric = 'average_pct'
      WHERE p.metric IN
        ('code_pct', 'commonsense_pct', 'reading_pct', 'gsm8k_pct', 'mmlu_pct', 'bbh_pct', 'agieval_pct')
      GROUP BY ALL"""
    rows = ask(home, sql)
    assert len(rows) == 14
    for model, setting, mean, average in rows:
        assert mean == pytest.approx(average, abs=0.0101), (model, setting)


def test_published_groups_are_the_means_of_their_benchmarks(home: Home) -> None:
    for suite, parts in {
        "code": ("humaneval", "mbpp"),
        "commonsense": ("piqa", "siqa", "hellaswag", "winogrande", "copa"),
        "reading": ("boolq", "lambada", "tydiqa"),
    }.items():
        wanted = ", ".join(f"'{part}_pct'" for part in parts)
        sql = (
            "SELECT p.model, p.setting, avg(p.value), any_value(g.value), count(*) FROM published p JOIN published g "
            f"ON (g.model, g.setting, g.metric) = (p.model, p.setting, '{suite}_pct') AND g.source LIKE '%Table 1' "
            f"WHERE p.metric IN ({wanted}) GROUP BY ALL"
        )
        rows = ask(home, sql)
        assert len(rows) == 11
        for model, setting, mean, group, count in rows:
            assert count == len(parts)
            assert mean == pytest.approx(group, abs=0.02), (suite, model, setting)


def test_published_numbers_agree_between_tables(home: Home) -> None:
    grouped = "FROM published GROUP BY model, setting, metric, condition"
    assert ask(home, f"SELECT model, setting, metric {grouped} HAVING min(value) < max(value)") == []
    row = "(model, setting, metric) = ('llama2-7b', 'prosparse', 'sparsity_pct')"
    sql = f"SELECT value FROM published WHERE {row} AND condition = "
    assert set(ask(home, sql + "''")) == {(89.32,)}
    assert ask(home, sql + "'threshold=0.02'") == [(90.35,)]
    assert ask(home, sql + "'tokens=89.13e9'") == [(88.29,)]


def test_published_speedups_are_the_ratios_of_their_times(home: Home) -> None:
    for kernel in ("s2", "s3"):
        sql = (
            "SELECT p.model, p.setting, d.value / p.value, s.value FROM published p "
            "JOIN published d ON (d.model, d.setting, d.metric) = (p.model, 'original', p.metric) "
            f"JOIN published s ON (s.model, s.setting, s.metric) = (p.model, p.setting, '{kernel}_speedup') "
            f"WHERE p.metric = '{kernel}_us'"
        )
        rows = ask(home, sql)
        assert len(rows) == 10
        for model, setting, ratio, printed in rows:
            assert ratio == pytest.approx(printed, abs=0.011), (model, setting)
