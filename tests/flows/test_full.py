"""The whole chain on ``tiny``, through Prefect, with the commands a user types; and a second run that does no work."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prosparse_core.ledger import Ledger
from prosparse_core.store import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROSPARSE = [sys.executable, "-m", "flows.cli"]
STEPS = (
    4 + 4 + 4 + 3
)  # model, mixture, substitute, calibrate; stages; variants; predictor, speed, export + report below


def prosparse(home: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        [*PROSPARSE, *arguments],
        cwd=home,  # not the repository: a server that `prosparse up` left on there must not be used
        env={**environment, "PROSPARSE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A home in which ``prosparse run tiny`` has run once, and its result."""
    home = tmp_path_factory.mktemp("home")
    result = json.loads(prosparse(home, "run", "tiny", "--json").stdout)
    return home, result


def test_the_result_names_every_setting_and_place(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert [s["setting"] for s in result["settings"]] == ["original", "vanilla_relu", "prosparse_star", "prosparse"]
    assert result["corpora"] == ["python-code", "package-docs", "code-instructions"]
    by_name = {s["setting"]: s for s in result["settings"]}
    for setting in by_name.values():
        assert all(p > 1 for p in setting["perplexity"].values())
        assert all(0 <= s < 1 for s in setting["sparsity"].values())
    code = {name: s["sparsity"]["python-code"] for name, s in by_name.items()}
    assert code["original"] < 0.01 < code["vanilla_relu"] < code["prosparse_star"] <= code["prosparse"]
    assert by_name["prosparse"]["threshold"] >= 0
    assert 0 < result["predictor"]["recall"] <= 1
    assert result["speed"]["gate_passed"] is True
    assert set(result["speed"]["speedup"]) >= {"s2", "s3", "ffn", "decode"}
    for name in ("model", "report", "ledger"):
        assert Path(result["places"][name]).exists(), name
    assert result["steps"] == {"done": STEPS + 1}


def test_every_artifact_is_whole_and_nothing_is_left_over(finished: tuple[Path, dict[str, Any]]) -> None:
    home, _ = finished
    folders = [p.parent for p in (home / "store").glob("*/*/artifact.json")]
    assert len(folders) == STEPS + 1
    assert all(verify(folder) == [] for folder in folders)
    assert not list((home / "store" / ".work").iterdir())


def test_the_ledger_answers(finished: tuple[Path, dict[str, Any]]) -> None:
    home, result = finished
    ledger = Ledger(home)
    assert ledger.query("SELECT status FROM runs ORDER BY started_at").rows[0][0] == "done"
    per_table = {
        table: ledger.query(f"SELECT count(*) FROM {table}").rows[0][0]
        for table in (
            "runs", "steps", "artifacts", "lineage", "variants", "train_metrics", "sparsity", "thresholds",
            "evaluations", "predictors", "speed", "published", "results", "leaderboard", "paper_gap",
            "threshold_tradeoff", "loss_curve", "speedup",
        )
    }  # fmt: skip
    assert all(per_table.values()), per_table
    assert per_table["train_metrics"] == 60
    assert per_table["sparsity"] >= 4 * 3 * 4  # variants x corpora x layers
    sql = (
        "SELECT value FROM results WHERE setting = 'prosparse' AND name = 'token_perplexity' "
        f"AND corpus_or_task LIKE '%python-code' AND run_id = '{result['run_id']}'"
    )
    ours = next(s for s in result["settings"] if s["setting"] == "prosparse")["perplexity"]["python-code"]
    assert ours in [pytest.approx(row[0]) for row in ledger.query(sql).rows]


def test_task_runs_have_readable_names_and_a_second_run_is_all_cached(finished: tuple[Path, dict[str, Any]]) -> None:
    home, first = finished
    began = time.monotonic()
    second = json.loads(prosparse(home, "run", "tiny", "--json").stdout)
    assert time.monotonic() - began < 120
    assert second["steps"] == {"cached": STEPS + 1}
    assert second["settings"] == first["settings"]
    runs = asyncio.run(_task_runs(home))
    names = [name for name, _ in runs]
    assert "stage 2 · lambda 0.02→0.1 · steps 26-45" in names
    assert "evaluate · prosparse" in names
    states = [state for _, state in runs]
    assert states.count("Cached") == STEPS + 1
    assert states.count("Completed") == STEPS + 1


async def _task_runs(home: Path) -> list[tuple[str, str]]:
    """(name, state) of every task run in the database that the runs' temporary servers left under ``home``."""
    import sqlite3

    database = next((home / "prefect").glob("*.db"))
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return list(connection.execute("SELECT name, state_name FROM task_run"))


def test_plan_shows_everything_cached_and_a_change_from_its_stage_on(finished: tuple[Path, dict[str, Any]]) -> None:
    home, _ = finished
    same = json.loads(prosparse(home, "plan", "tiny", "--json").stdout)
    assert {s["outcome"] for s in same["steps"]} == {"cached"}
    changed = json.loads(prosparse(home, "plan", "tiny", "--json", "--set", "train.stages.3.l1=0.3").stdout)
    outcomes = [s["outcome"] for s in changed["steps"]]
    assert outcomes[:6] == ["cached"] * 6, "the stages before the changed one are shared"
    assert outcomes[6] == "would run"


def test_export_and_report_of_the_newest_run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    home, _ = finished
    target = tmp_path / "model"
    prosparse(home, "export", "--out", str(target))
    assert (target / "config.json").is_file()
    assert prosparse(home, "export", "--out", str(target), check=False).returncode == 2
    prosparse(home, "report", "--out", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prosparse_star" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_query_prints_tables_and_json(finished: tuple[Path, dict[str, Any]]) -> None:
    home, _ = finished
    rows = json.loads(prosparse(home, "query", "SELECT recipe, status FROM runs", "--json").stdout)
    assert rows[0] == {"recipe": "tiny", "status": "done"}
    assert prosparse(home, "query", "SELEC 1", check=False).returncode == 2
    assert prosparse(home, "query", "DELETE FROM published", check=False).returncode == 2
