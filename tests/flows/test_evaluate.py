"""``prosparse evaluate``: any checkpoint measured without training, bad input named before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli, console
from prosparse_core import recipe as recipes
from prosparse_core.ledger import Ledger
from prosparse_core.variants import MODEL
from tests.tasks.held_out_files import make_model
from tests.tasks.mini_hub import DATA, write_mini_hub, write_parquet

SMALL = {name: DATA[name] for name in ("baber/piqa", "lighteval/siqa", "aps/super_glue", "EleutherAI/lambada_openai")}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("PROSPARSE_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "out", console.out)  # --json sends it elsewhere for good
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder / MODEL


def test_the_verb_measures_records_and_shows(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = write_mini_hub(tmp_path / "hub", SMALL)
    arguments = ["evaluate", str(model), "--datasets", str(hub), "--limit", "1", "--batch-size", "2", "--inline"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "acc_ppl" in shown
    assert f"n/a: dataset Rowan/hellaswag not found in {hub}" in shown.replace("\n", "")
    assert "n/a: runs code the model wrote, which evaluate.run_code does not allow" in shown
    ledger = Ledger(home)
    (run,) = ledger.query("SELECT flow, recipe, model, status, recipe_yaml FROM runs").records()
    assert (run["flow"], run["model"], run["status"]) == ("evaluate", "model", "done")
    assert "train" not in run["recipe_yaml"]
    rows = ledger.query(
        'SELECT task, value, note, "limit", batch_size, dtype FROM evaluations WHERE headline'
    ).records()
    by_task = {row["task"]: row for row in rows}
    assert by_task["piqa"]["value"] is not None
    assert (by_task["piqa"]["limit"], by_task["piqa"]["batch_size"]) == (1, 2)
    assert len({(row["batch_size"], row["dtype"]) for row in rows}) == 1, "alike for every row that is compared"
    assert by_task["mmlu"]["note"] == f"dataset cais/mmlu not found in {hub}"
    (board,) = ledger.query("SELECT not_measured, average, partial FROM leaderboard").records()
    assert any(line.startswith("hellaswag: dataset Rowan/hellaswag") for line in board["not_measured"])
    assert (board["average"], board["partial"]) == (None, True)

    assert cli.main([*arguments, "--force"]) == 0
    assert "1 cached, 1 done" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == {"cached": 2}
    assert {row["task"] for row in said["benchmarks"]["original"]} >= {"piqa", "mmlu", "humaneval"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "is no folder, and no hub id"),
        (["MODEL", "--tasks", "piqa,hellaswg"], "did you mean hellaswag"),
        (["MODEL", "--tasks", "humaneval"], "--run-code"),
        (["MODEL", "--datasets", "nowhere"], "evaluate.datasets: nowhere is no folder"),
        (["MODEL", "--datasets", "HUB", "--tasks", "piqa"], "lacks the column sol2"),
        (["MODEL", "--limit", "0"], "limit=0: at least 1"),
        (["MODEL", "--recipe", "tinny"], "did you mean tiny"),
        (["MODEL", "--recipe", "RECIPE"], "none.jsonl"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    rows = [{"goal": "g", "sol1": "s", "label": 0}]
    write_parquet(tmp_path / "wrong/baber/piqa/default/validation.parquet", rows)
    raw = yaml.safe_load(recipes.find("tiny").read_text(encoding="utf-8"))
    raw["data"]["sources"][0] = {"name": "mine", "kind": "files", "path": "none.jsonl", "weight": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    names = {"MODEL": str(model), "HUB": str(tmp_path / "wrong"), "RECIPE": str(tmp_path / "mine.yaml")}
    assert cli.main(["evaluate", *(names.get(a, a) for a in arguments), "--inline"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not home.exists()


@pytest.mark.slow
def test_a_recipe_s_corpora_beside_the_benchmarks(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = write_mini_hub(tmp_path / "hub", SMALL)
    arguments = ["evaluate", str(model), "--recipe", "tiny", "--tasks", "piqa", "--datasets", str(hub), "--limit", "2"]
    assert cli.main([*arguments, "--inline", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["corpora"] == ["python-code", "package-docs", "code-instructions"]
    assert set(said["settings"][0]["perplexity"]) == set(said["corpora"])
    assert [row["metric"] for row in said["benchmarks"]["original"]] == ["acc_ppl", "acc", "acc_norm"]
    (row,) = Ledger(home).query("SELECT model, setting FROM leaderboard").records()
    assert row == {"model": "model", "setting": "original"}


@pytest.mark.slow
def test_through_prefect(home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = write_mini_hub(tmp_path / "hub", {"lighteval/siqa": DATA["lighteval/siqa"]})
    import subprocess
    import sys

    command = [sys.executable, "-m", "flows.cli", "evaluate", str(model), "--tasks", "siqa", "--datasets", str(hub)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, "--json"], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [r["task"] for r in json.loads(done.stdout)["benchmarks"]["original"]] == ["social_iqa"] * 2
