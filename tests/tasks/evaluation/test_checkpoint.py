"""Any checkpoint becomes a variant: what it is called, which activation it runs, what is refused before it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prosparse_core.errors import BadInput
from prosparse_core.export import Card, export_hf, fatrelu_config
from prosparse_core.families import LLAMA, family_of
from prosparse_core.substitute import use_thresholds
from prosparse_core.variants import MODEL, Variant, check_folder, load_model, load_variant
from tasks.base_model import identity
from tasks.evaluate import evaluate
from tasks.evaluation.checkpoint import checkpoint, dense_config, find_checkpoint
from tests.tasks.held_out_files import make_model
from tests.tasks.mini_hub import DATA, write_mini_hub

THRESHOLDS = [0.02, 0.3]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_model(folder)
    return folder / MODEL


def exported(dense: Path, target: Path, **changes: Any) -> Path:
    """A folder as an export leaves it, without the check in a fresh process."""
    shutil.copytree(dense, target)
    config = fatrelu_config(check_folder(dense), THRESHOLDS) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits


def test_an_exported_folder_runs_fatrelu_with_its_thresholds(base: Any, dense: Path, tmp_path: Path) -> None:
    folder = exported(dense, tmp_path / "mine-prosparse")
    target = find_checkpoint(str(folder), base.home)
    assert (target.model.id, target.setting, target.activation) == ("mine-prosparse", "prosparse", "fatrelu")
    run, _ = base.run()
    variant = checkpoint(run, target)
    assert variant.layer_thresholds() == THRESHOLDS
    twin, _ = load_model(dense)
    use_thresholds(twin, THRESHOLDS)
    ours, _ = load_variant(variant)
    assert torch.equal(logits(ours), logits(twin))
    assert not torch.equal(logits(ours), logits(load_model(dense)[0]))
    assert checkpoint(run, find_checkpoint(str(folder), base.home)).checkpoint.digest == variant.checkpoint.digest
    assert run.history[-1][2] == "cached"


@pytest.mark.slow
def test_it_is_what_a_stranger_s_transformers_computes(base: Any, dense: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from prosparse_core.families import find_ffns

    card = Card(
        model="m", base_model=None, setting="prosparse", config=check_folder(dense), thresholds=THRESHOLDS,
        tokens_seen=0, recipe="r", stages=[],
    )  # fmt: skip
    export_hf(dense, THRESHOLDS, tmp_path / "hf", card=card.render())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    assert len(find_ffns(theirs)) == 2, "the meter finds its FFNs under the exported name"
    ours, _ = load_variant(checkpoint(base.run()[0], find_checkpoint(str(tmp_path / "hf"), base.home)))
    assert torch.equal(logits(ours), logits(theirs))


def test_a_released_fatrelu_model_is_read_by_the_same_keys() -> None:
    released = {
        "model_type": "sparsellama",
        "architectures": ["SparseLlamaForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"},
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.01,
        "num_hidden_layers": 3,
        "hidden_size": 8,
    }
    config, thresholds = dense_config(released, where="there")
    assert config == {"model_type": "llama", "hidden_act": "relu", "num_hidden_layers": 3, "hidden_size": 8}
    assert thresholds == [0.01] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu"},
        {"hidden_act_params": None},
        {"hidden_act_params": [0.1]},
        {"hidden_act_params": [0.1, -1.0]},
        {"hidden_act_param": 0.1},
    ],
)
def test_an_export_that_does_not_say_fatrelu_soundly_is_refused(
    dense: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = exported(dense, tmp_path / "odd", **changes)
    with pytest.raises(BadInput, match=r"config\.json must say hidden_act: fatrelu"):
        find_checkpoint(str(folder), tmp_path)


def test_exported_folders_have_the_family_of_their_architecture_and_are_no_dense_models(
    dense: Path, tmp_path: Path
) -> None:
    assert family_of({"model_type": "prosparse_llama"}) is LLAMA
    assert family_of({"model_type": "prosparse_novel"}) is None
    from prosparse_core.recipe import Model

    folder = exported(dense, tmp_path / "done")
    with pytest.raises(BadInput, match="this pipeline exported") as caught:
        identity(Model(id="x", source=str(folder)))
    assert caught.value.hint == f"measure it with prosparse evaluate {folder}"


def test_dense_and_relu_folders(base: Any, dense: Path, tmp_path: Path) -> None:
    target = find_checkpoint(str(dense), base.home)
    assert (target.setting, target.activation) == ("original", "original")
    relu = tmp_path / "relullama"
    shutil.copytree(dense, relu)
    config = json.loads((relu / "config.json").read_text())
    (relu / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    target = find_checkpoint(str(relu), base.home)
    assert (target.model.id, target.setting, target.activation) == ("relullama", "relu", "relu")
    model, _ = load_variant(checkpoint(base.run()[0], target))
    twin, _ = load_model(dense)
    use_thresholds(twin, [0.0])
    assert torch.equal(logits(model), logits(twin))


def test_what_is_no_model_is_refused(base: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "novel").mkdir()
    (tmp_path / "novel" / "config.json").write_text('{"model_type": "novel"}')
    for name, said in (
        (tmp_path / "empty", "no model folder"),
        (tmp_path / "novel", "no known FFN family"),
        (tmp_path / "nothing", "is no folder, and no hub id"),
        ("prosparse@00000000", "no variant 'prosparse@00000000' in the ledger"),
        ("0123456789abcdef", "is in no artifact of the ledger"),
    ):
        with pytest.raises(BadInput, match=said):
            find_checkpoint(str(name), base.home)
    with pytest.raises(BadInput, match="there is no ledger"):
        find_checkpoint("prosparse@00000000", tmp_path)


def test_variants_and_digests_of_the_ledger(base: Any, tmp_path: Path) -> None:
    hub = write_mini_hub(tmp_path, {"lighteval/siqa": DATA["lighteval/siqa"]})
    run, _ = base.run(evaluate={"benchmarks": ["siqa"], "datasets": str(hub)})
    digest = str(base.dense.digest)
    for variant in (
        Variant("original", base.dense, "original"),
        Variant("shifted_relu", base.dense, "shifted_relu", shift=0.125),
    ):
        evaluate(run, variant, None)
        target = find_checkpoint(variant.id, base.home)
        found = checkpoint(run, target)
        assert (found.setting, found.activation, found.shift) == (variant.setting, variant.activation, variant.shift)
        assert found.checkpoint.path == base.dense.path
        assert target.model.id == "tiny"
        evaluate(run, found, None)
        assert run.history[-1][2] == "cached", "the same thing, measured the same way"
    by_setting = find_checkpoint("shifted_relu", base.home)
    assert by_setting.variant is not None
    assert by_setting.variant.id == f"shifted_relu@{digest[:8]}"
    with pytest.raises(BadInput, match="and no setting measured here"):
        find_checkpoint("closed_loop", base.home)
    with pytest.raises(BadInput, match=r"was measured as \d+ variants") as caught:
        find_checkpoint(digest[:10], base.home)
    assert f"shifted_relu@{digest[:8]}" in str(caught.value.hint)


def test_a_model_never_measured_goes_by_its_digest(base: Any) -> None:
    from prosparse_core.recipe import Model
    from tasks.base_model import base_model

    run, _ = base.run()
    config = {**base.recipe["model"]["config"], "num_hidden_layers": 1}
    artifact = base_model(run, Model(id="one-layer", source="random:llama", config=config))
    target = find_checkpoint(str(artifact.digest)[:12], base.home)
    assert (target.model.id, target.setting) == ("one-layer", "original")
    assert checkpoint(run, target).checkpoint.path == artifact.path
    with pytest.raises(BadInput, match="of step mixture is no model"):
        find_checkpoint(str(base.corpora.digest), base.home)
