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
from prosparse_core.formats.plain import export_vllm, strictly_above
from prosparse_core.recipe import Model
from prosparse_core.store import RECORD, Artifact
from prosparse_core.substitute import UNKNOWN_TO_TRANSFORMERS, use_activation, use_thresholds
from prosparse_core.variants import MODEL, Variant, check_folder, load_model, load_variant
from tasks.base_model import OWN_ACTIVATIONS, identity
from tasks.evaluate import evaluate
from tasks.evaluation.checkpoint import checkpoint, find_checkpoint
from tasks.evaluation.sparse_config import plain_model
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
    found = plain_model(released, where="there")
    assert found is not None
    assert found.config == {"model_type": "llama", "hidden_act": "relu", "num_hidden_layers": 3, "hidden_size": 8}
    assert (found.activation, found.setting, found.thresholds) == ("fatrelu", "prosparse", [0.01] * 3)


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
    from tasks.base_model import base_model

    run, _ = base.run()
    config = {**base.recipe["model"]["config"], "num_hidden_layers": 1}
    artifact = base_model(run, Model(id="one-layer", source="random:llama", config=config))
    target = find_checkpoint(str(artifact.digest)[:12], base.home)
    assert (target.model.id, target.setting) == ("one-layer", "original")
    assert checkpoint(run, target).checkpoint.path == artifact.path
    with pytest.raises(BadInput, match="of step mixture is no model"):
        find_checkpoint(str(base.corpora.digest), base.home)


def copied(dense: Path, target: Path, **changes: Any) -> Path:
    """The dense model with another config.json."""
    shutil.copytree(dense, target)
    config = json.loads((dense / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize("thresholds", [[0.3, 0.3], [0.0, 0.0]])
def test_what_we_export_for_vllm_is_read_back_as_the_variant_it_was_made_of(
    base: Any, dense: Path, tmp_path: Path, thresholds: list[float]
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thresholds.json").write_text(json.dumps({"per_layer": thresholds}))
    made_of = Variant(
        "prosparse",
        Artifact("stage", "s", "0" * 64, "1" * 64, dense.parent),
        "fatrelu",
        Artifact("calibrate", "c", "2" * 64, "3" * 64, tmp_path / "t"),
    )
    folder = export_vllm(made_of, tmp_path / "served").target
    variant = checkpoint(base.run()[0], find_checkpoint(str(folder), base.home))
    assert (variant.setting, variant.activation) == ("prosparse", "fatrelu")
    read = variant.layer_thresholds()
    assert read == pytest.approx(thresholds, rel=1e-7)
    assert [strictly_above(t) for t in read or []] == [strictly_above(t) for t in thresholds]
    ours, theirs = logits(load_variant(variant)[0]), logits(load_variant(made_of)[0])
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, logits(relu_of(dense))) == (thresholds == [0.0, 0.0]), "the threshold must matter here"


def relu_of(dense: Path) -> Any:
    model, _ = load_model(dense)
    use_thresholds(model, [0.0])
    return model


@pytest.mark.parametrize(
    ("config", "model_type", "thresholds"),
    [
        ({"model_type": "qwen2", "hidden_act": "fatrelu", "hidden_act_param": 0.1}, "qwen2", [0.1] * 3),
        ({"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": [0.1, 0, 1]}, "llama", [0.1, 0, 1]),
        ({"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_params": [0.1, 0, 1]}, "llama", [0.1, 0, 1]),
        ({"model_type": "gpt2", "activation_function": "fatrelu", "hidden_act_param": 0.1}, "gpt2", [0.1] * 3),
        # Its own class keeps x >= t, as the paper does: the parameter is the threshold.
        (
            {
                "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "hidden_act": "fatrelu",
                "hidden_act_param": 0.03, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
                "num_attention_heads": 4,
            },
            "granite",
            [0.03] * 3,
        ),
    ],
)  # fmt: skip
def test_fatrelu_of_any_known_family(config: dict[str, Any], model_type: str, thresholds: list[float]) -> None:
    found = plain_model({**config, "num_hidden_layers": 3, "hidden_size": 512}, where="there")
    assert found is not None
    assert (found.config["model_type"], found.thresholds) == (model_type, thresholds)
    assert "fatrelu" not in json.dumps(found.config)
    assert "hidden_act_param" not in json.dumps(found.config)
    family = family_of(found.config)
    assert family is not None
    assert found.config[family.config_key] == "relu"
    # A parameter without the activation says nothing: MiniCPM's plain checkpoints have one.
    assert plain_model({**config, "hidden_act": "silu", "activation_function": "gelu"}, where="there") is None


def test_fatrelu_without_a_threshold_is_refused(base: Any, dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path / "odd", hidden_act="fatrelu")
    with pytest.raises(BadInput, match=r"hidden_act_param \(all layers\).* it says 'fatrelu', None and None"):
        find_checkpoint(str(folder), base.home)


@pytest.mark.parametrize("activation", ["drelu", "shifted_relu"])
def test_the_model_folder_of_a_stage_runs_what_it_was_trained_with(
    base: Any, dense: Path, tmp_path: Path, activation: str
) -> None:
    shift = 0.25 if activation == "shifted_relu" else None
    model, tokenizer = load_model(dense)
    use_activation(model, activation, shift)
    folder = tmp_path / "stage" / MODEL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "stage" / RECORD).write_text(json.dumps({"payload": {"config": {"train": {"shift": shift}}}}))
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == UNKNOWN_TO_TRANSFORMERS + activation

    target = find_checkpoint(str(folder), base.home)
    assert (target.setting, target.activation, target.shift) == (activation, activation, shift)
    variant = checkpoint(base.run()[0], target)
    assert torch.equal(logits(load_variant(variant)[0]), logits(model))
    kept = json.loads((variant.checkpoint.path / MODEL / "config.json").read_text())
    assert kept["hidden_act"] == UNKNOWN_TO_TRANSFORMERS + activation, "a plain reload refuses it"

    again = find_checkpoint(str(variant.checkpoint.digest)[:12], base.home)
    assert again.variant == variant, "by its digest, though nothing of it was measured"
    if activation == "shifted_relu":
        (tmp_path / "stage" / RECORD).unlink()
        with pytest.raises(BadInput, match="hidden_act_param is None: Shifted ReLU has a shift"):
            find_checkpoint(str(folder), base.home)


def test_a_released_shifted_relu_has_its_shift_in_the_config(base: Any, dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path / "shifted", hidden_act="shiftrelu", hidden_act_param=0.25)
    variant = checkpoint(base.run()[0], find_checkpoint(str(folder), base.home))
    twin, _ = load_model(dense)
    use_activation(twin, "shifted_relu", 0.25)
    assert torch.equal(logits(load_variant(variant)[0]), logits(twin))


def test_every_activation_of_ours_that_a_stage_writes_has_its_name() -> None:
    written = {UNKNOWN_TO_TRANSFORMERS + name: name for name in ("shifted_relu", "drelu")}
    assert written == {k: v for k, v in OWN_ACTIVATIONS.items() if k.startswith(UNKNOWN_TO_TRANSFORMERS)}


def test_an_activation_nobody_knows_is_refused_with_those_that_are_known(
    base: Any, dense: Path, tmp_path: Path
) -> None:
    folder = copied(dense, tmp_path / "odd", hidden_act="swishglu")
    with pytest.raises(BadInput) as caught:
        find_checkpoint(str(folder), base.home)
    assert str(caught.value) == f"{folder}/config.json: unknown activation 'swishglu'"
    assert {"silu", "relu", "fatrelu", "shiftrelu"} <= set(str(caught.value.hint).removeprefix("known: ").split(", "))
    copied(dense, tmp_path / "rare", hidden_act="relu6")
    assert find_checkpoint(str(tmp_path / "rare"), base.home).activation == "original"


def test_an_import_goes_by_its_digest_too(base: Any, dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path / "released", hidden_act="fatrelu", hidden_act_param=0.125)
    variant = checkpoint(base.run()[0], find_checkpoint(str(folder), base.home))
    again = find_checkpoint(str(variant.checkpoint.digest)[:12], base.home)
    assert again.variant == variant
    assert variant.layer_thresholds() == [0.125, 0.125]


@pytest.fixture
def hub(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has owner/sparse with weights as PyTorch pickles them, and remembers what it was asked for."""
    import huggingface_hub
    from safetensors.torch import load_file

    folder = copied(dense, tmp_path / "hub", hidden_act="fatrelu", hidden_act_param=0.125)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    asked: list[dict[str, Any]] = []

    def config(repo: str, name: str, revision: str | None) -> str:
        return str(folder / name) if repo == "owner/sparse" else str(folder / "nothing")

    def snapshot(repo: str, **options: Any) -> str:
        asked.append(options)
        if options["local_files_only"]:
            raise FileNotFoundError(repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_hub_id_runs_the_fatrelu_of_its_config(base: Any, dense: Path, hub: list[dict[str, Any]]) -> None:
    target = find_checkpoint("owner/sparse", base.home)
    assert (target.model.id, target.setting, target.activation) == ("owner/sparse", "prosparse", "fatrelu")
    run, _ = base.run()
    run.planning = True
    assert checkpoint(run, target).checkpoint.folder is None
    assert [options["local_files_only"] for options in hub] == [True], "a plan downloads nothing"
    assert run.history == [("base model · owner/sparse", None, "would run")]

    variant = checkpoint(base.run()[0], target)
    assert "pytorch_model*.bin" not in hub[1]["allow_patterns"], "only where there is nothing better"
    assert "pytorch_model*.bin" in hub[2]["allow_patterns"]
    assert [p.suffix for p in (variant.checkpoint.path / MODEL).glob("*model.*")] == [".safetensors"]
    twin, _ = load_model(dense)
    use_thresholds(twin, [0.125])
    assert torch.equal(logits(load_variant(variant)[0]), logits(twin))
    assert find_checkpoint("owner/other", base.home).exported is None
