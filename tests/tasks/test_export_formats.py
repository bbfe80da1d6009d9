"""From a run in the ledger to a file of another program, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from prosparse_core.errors import BadInput
from prosparse_core.formats.powerinfer_verify import verify
from prosparse_core.store import Artifact
from prosparse_core.thresholds import THRESHOLDS
from prosparse_core.variants import Variant
from tasks.export_formats import check_windows, made_by
from tasks.predictor import predictor

SECTION = {"hidden": 24, "train_tokens": 300, "test_tokens": 100, "epochs": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def run(base: Any) -> Any:
    """A finished run whose predictors were trained for a ReLU model."""
    found, _ = base.run(predictor=SECTION)
    predictor(found, Variant("prosparse_star", base.dense, "relu"), base.corpora)
    found.ledger.end_run(found.run_id, "done", None)
    return found


@pytest.fixture
def at_home(base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROSPARSE_HOME", str(base.home))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("at_home")
def test_powerinfer_by_the_command_line(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", run.run_id, "--to", "powerinfer", "--strict"]
    assert cli.main([*arguments, "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    target = tmp_path / "test-prosparse.powerinfer.gguf"
    assert found["target"] == str(target)
    assert verify(target) == []
    assert found["perplexity"] == pytest.approx(found["torch_perplexity"], rel=0.01)
    assert found["dtype"] == "f16"
    assert any("a way of its own" in note for note in found["notes"])
    assert "note: PowerInfer splits text" in streams.err.replace("\n", " ")

    assert cli.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*arguments, "--cutoff", "0.3", "--out", "other.gguf"]) == 2
    assert "only 0.5 means the same" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "other.gguf").exists()


def test_the_variant_is_the_one_of_the_step(run: Any, base: Any, tmp_path: Path) -> None:
    made = made_by(run.run_id, "predictor", run.ledger, base.home)
    assert made.variant == Variant("prosparse_star", made.variant.checkpoint, "relu")
    assert made.variant.checkpoint.digest == base.dense.digest
    assert made.corpora.digest == base.corpora.digest
    assert (made.recipe, made.model) == ("test", "tiny")
    windows = check_windows(made, max_tokens=100)
    assert [w.shape for w in windows] == [(1, 64), (1, 36)]

    with pytest.raises(BadInput, match=f"run {run.run_id} made no export"):
        made_by(run.run_id, "export", run.ledger, base.home)


def test_thresholds_come_along(base: Any) -> None:
    work = base.home / "thresholds"
    work.mkdir()
    (work / THRESHOLDS).write_text(json.dumps({"per_layer": [0.0, 0.01, 0.02]}))
    run, _ = base.run(predictor=SECTION)
    thresholds = run.store.commit(
        work, step="calibrate", label="c", payload={"is": "here"}, inputs={}, provenance={}, meta={}
    )
    predictor(run, Variant("prosparse", base.dense, "fatrelu", thresholds), base.corpora)
    made = made_by(run.run_id, "predictor", run.ledger, base.home)
    assert made.variant.layer_thresholds() == [0.0, 0.01, 0.02]
    assert isinstance(made.variant.thresholds, Artifact)


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(("to", "ending"), [("vllm", "vllm"), ("hf-relu", "relu")])
def test_plain_folders_by_the_command_line(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, ending: str
) -> None:
    run, _ = base.run()
    variant = Variant("prosparse_star", base.dense, "relu")
    run.step(
        "export",
        to,
        lambda work: None,
        version=0,
        config={"variant": variant.identity, "for": to},
        inputs={**variant.inputs, "corpora": base.corpora},
    )
    assert cli.main(["export", run.run_id, "--to", to, "--json", "--strict"]) == 0
    found = json.loads(capsys.readouterr().out)
    target = tmp_path / f"test-prosparse-{ending}"
    assert found == {"target": str(target), "threshold": 0.0, "notes": []}
    config = json.loads((target / "config.json").read_text())
    assert config["hidden_act"] == {"vllm": "fatrelu", "hf-relu": "relu"}[to]
    assert (target / "model.safetensors").read_bytes() == (base.dense.path / "model" / "model.safetensors").read_bytes()
