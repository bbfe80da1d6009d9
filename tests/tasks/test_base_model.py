"""Where a dense model comes from when transformers or the families do not know it, and what is refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_core import families
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.formats.gguf_dense import write_dense_gguf
from prosparse_core.random_model import train_tokenizer
from prosparse_core.recipe import Model, parse
from prosparse_core.source_precision import KEY
from prosparse_core.substitute import use_thresholds
from prosparse_core.variants import MODEL, Variant, load_variant
from tasks.base_model import base_model, check_chain, identity
from tasks.evaluation.checkpoint import checkpoint, find_checkpoint
from tests.tasks.conftest import MODEL as SIZES
from tests.tasks.conftest import make_run

CODE = Path(__file__).parents[1] / "prosparse_core" / "remote_minicpm"
LAYOUT = {
    "layers": "model.layers",
    "ffn": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "act": "act_fn",
}


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is downloaded: weights, config, tokenizer and the code of its architecture."""
    folder = tmp_path_factory.mktemp("hub") / "minicpm"
    tokenizer = train_tokenizer(300)
    config = AutoConfig.from_pretrained(CODE, trust_remote_code=True, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def run_of(base: Any, **model: Any) -> Any:
    return make_run(base.home, parse({**base.recipe, "model": {"id": "m", "precision": "fp32", **model}}))[0]


def test_code_that_comes_with_a_checkpoint_runs_only_when_it_is_trusted(
    base: Any, minicpm: Path, tmp_path: Path
) -> None:
    novel = tmp_path / "novel"
    shutil.copytree(minicpm, novel)
    edit(novel, model_type="novel")
    with pytest.raises(BadInput, match="a novel, which runs by code of its own that is not trusted") as caught:
        identity(Model.model_validate({"id": "m", "source": str(novel), "family": LAYOUT}))
    assert "model.trust_remote_code: true" in (caught.value.hint or "")

    dense = base_model(run_of(base, source=str(minicpm), trust_remote_code=True))
    assert (dense.meta()["d_model"], dense.meta()["d_ff"]) == (32, 53)
    model, _ = load_variant(Variant("vanilla_relu", dense, "relu"))
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(find_ffns(model)[0].activation).__name__ == "ReLU"
    named = json.loads((dense.path / MODEL / "config.json").read_text())["auto_map"].values()
    assert all((dense.path / MODEL / f"{name.partition('.')[0]}.py").is_file() for name in named)


def test_a_checkpoint_to_be_measured_runs_its_code_only_on_request(base: Any, minicpm: Path) -> None:
    run = run_of(base, source=str(minicpm))
    for trusted, model_type in ((False, "granite"), (True, "minicpm")):
        target = find_checkpoint(str(minicpm), base.home, trust_remote_code=trusted)
        config = json.loads((checkpoint(run, target).checkpoint.path / MODEL / "config.json").read_text())
        assert (config["model_type"], "auto_map" in config) == (model_type, trusted)


def test_a_minicpm_is_the_granite_it_is_read_as(base: Any, minicpm: Path, tmp_path: Path) -> None:
    dense = base_model(run_of(base, source=str(minicpm)))
    assert dense.meta()["model_type"] == "granite"
    granite, tokenizer = load_variant(Variant("original", dense, "original"))
    own = AutoModelForCausalLM.from_pretrained(minicpm, trust_remote_code=True).eval()
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = own(input_ids=ids).logits, granite(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.abs().max()) > 0.05

    for changes, message in (
        ({"scale_depth": None}, "it has no scale_depth"),
        ({"num_experts": 8}, "it has 8 experts"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ):
        folder = tmp_path / message.split()[-1].strip("'")
        shutil.copytree(minicpm, folder)
        edit(folder, **changes)
        with pytest.raises(BadInput, match=message):
            identity(Model(id="m", source=str(folder)))


def test_a_minicpm_that_runs_fatrelu_is_measured_with_it_and_is_no_dense_model(
    base: Any, minicpm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "minicpm-s"
    shutil.copytree(minicpm, folder)
    edit(folder, hidden_act="fatrelu", hidden_act_param=0.01)
    assert list(folder.glob("*.py")), "its code comes with it, and is not needed"
    variant = checkpoint(base.run()[0], find_checkpoint(str(folder), base.home))
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert variant.layer_thresholds() == [0.01] * num_layers
    assert variant.fact("m")["source_precision"] == variant.checkpoint.meta()["source_precision"] == "fp32"
    granite, tokenizer = load_variant(variant)
    assert granite.config.model_type == "granite"
    own = AutoModelForCausalLM.from_pretrained(minicpm, trust_remote_code=True).eval()
    use_thresholds(own, [0.01])
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = own(input_ids=ids).logits, granite(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    for trusted in (False, True):
        with pytest.raises(BadInput, match=r"config\.json: the activation is 'fatrelu': this is no dense") as caught:
            identity(Model(id="m", source=str(folder), trust_remote_code=trusted))
        assert "prosparse evaluate" in (caught.value.hint or "")


def test_an_activation_that_transformers_lacks_is_refused_wherever_a_model_comes_from(
    base: Any, minicpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(base.dense.path / MODEL, folder)
    edit(folder, hidden_act="swishglu")
    with pytest.raises(BadInput, match=r"odd/config\.json: unknown activation 'swishglu'"):
        identity(Model(id="m", source=str(folder)))
    with pytest.raises(BadInput, match=r"model\.config: unknown activation 'swishglu'"):
        identity(Model(id="m", source="random:llama", config={"hidden_act": "swishglu"}))
    with pytest.raises(BadInput, match=r"model\.config: the activation is 'prosparse_drelu': this is no dense model"):
        identity(Model(id="m", source="random:llama", config={"hidden_act": "prosparse_drelu"}))
    # A hub id is looked at when it has been read.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner" / "odd")
    monkeypatch.setattr("tasks.base_model.identity", lambda model: {"hub": model.source})
    with pytest.raises(BadInput, match=r"config\.json of owner/odd: unknown activation 'swishglu'"):
        base_model(run_of(base, source="owner/odd"))
    # Its own code may know what transformers does not; where the architecture reads no key, it is not looked up.
    known = tmp_path / "known"
    shutil.copytree(minicpm, known)
    edit(known, hidden_act="swishglu")
    identity(Model(id="m", source=str(known), trust_remote_code=True))
    identity(Model(id="m", source="random:bloom", config={"hidden_act": "swishglu"}))


def test_code_that_does_not_run_here_says_so(base: Any, minicpm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(minicpm, folder)
    code = folder / "modeling_minicpm.py"
    code.write_text(code.read_text() + "\nfrom transformers.utils.import_utils import is_gone_since_five\n")
    with pytest.raises(BadInput, match=r"the code that comes with .* does not run with transformers 5"):
        base_model(run_of(base, source=str(folder), trust_remote_code=True))


def test_a_name_of_code_that_is_not_there_does_not_stay_in_the_config(base: Any, tmp_path: Path) -> None:
    """Checkpoints of architectures that transformers has by now still name the code they once needed."""
    folder = tmp_path / "llama"
    shutil.copytree(base.dense.path / MODEL, folder)
    edit(folder, auto_map={"AutoModelForCausalLM": "owner/name--modeling_old.OldForCausalLM"})
    dense = base_model(run_of(base, source=str(folder)))
    assert "auto_map" not in json.loads((dense.path / MODEL / "config.json").read_text())


def test_a_family_described_in_the_recipe_travels_with_the_weights(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "novel"
    shutil.copytree(base.dense.path / MODEL, folder)
    monkeypatch.setattr(families, "FAMILIES", ())
    with pytest.raises(BadInput, match=r"(?s)no known FFN family.*model\.layers\.0\.mlp: gate_proj"):
        identity(Model(id="m", source=str(folder)))
    dense = base_model(run_of(base, source=str(folder), family=LAYOUT))
    kept = json.loads((dense.path / MODEL / "config.json").read_text())["prosparse_family"]
    assert kept == LAYOUT
    model, _ = load_variant(Variant("vanilla_relu", dense, "relu"))
    model.save_pretrained(tmp_path / "stage")
    assert json.loads((tmp_path / "stage" / "config.json").read_text())["prosparse_family"] == LAYOUT
    with pytest.raises(BadInput, match="layer 0 of LlamaForCausalLM lacks a part of family custom"):
        base_model(run_of(base, source=str(folder), family={**LAYOUT, "down": "w2"}))
    with pytest.raises(BadInput, match=r"model\.family\.dwon: unknown key"):
        run_of(base, source=str(folder), family={**LAYOUT, "dwon": "x"})


def test_sizes_have_common_names_in_a_random_model(base: Any) -> None:
    dense = base_model(run_of(base, source="random:gpt2", config={**SIZES, "num_hidden_layers": 2}))
    meta = dense.meta()
    assert (meta["model_type"], meta["num_layers"], meta["d_model"], meta["d_ff"]) == ("gpt2", 2, 48, 101)


def test_the_precision_of_the_source_goes_with_the_weights(base: Any, tmp_path: Path) -> None:
    """ "Original" is what the file held: a stage, an export and another import say so too, by the config they copy."""

    def of(source: Path) -> tuple[Any, Any, Any]:
        dense = base_model(run_of(base, source=str(source)))
        config = json.loads((dense.path / MODEL / "config.json").read_text())
        fact = Variant("original", dense, "original").fact("m")
        return dense.meta()["source_precision"], config[KEY], fact["source_precision"]

    assert base.dense.meta()["source_precision"] == "fp32 random"
    folder = tmp_path / "half"
    shutil.copytree(base.dense.path / MODEL, folder)
    assert of(folder) == ("fp32 random",) * 3, "what is known of the weights outlasts how they are stored"
    edit(folder, **{KEY: None, "dtype": "bfloat16"})
    for path in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    assert of(folder) == ("bf16",) * 3
    write_dense_gguf(base.dense.path / MODEL, tmp_path / "m.gguf")
    assert of(tmp_path / "m.gguf") == ("fp16",) * 3


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"train": {"activation": "drelu"}}, "family gpt2 has no gate"),
        ("olmo2", {"predictor": {"input": "pre_norm"}}, "olmo2 has no norm before its FFN"),
    ],
)
def test_what_a_later_step_cannot_do_is_refused_before_any_training(
    base: Any, model_type: str, changes: dict[str, Any], message: str
) -> None:
    model = {"id": "m", "source": f"random:{model_type}", "config": {**SIZES, "num_hidden_layers": 1}}
    recipe = {**base.recipe, "model": model}
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    run, _ = make_run(base.home, parse(recipe))
    with pytest.raises(BadInput, match=message):
        base_model(run)
    dense = base_model(run, run.recipe.model)  # another model than the one that is trained: nothing to refuse
    with pytest.raises(BadInput, match=message):
        check_chain(run, dense, [run.recipe.train.activation])
