from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from models import MODEL_TYPES, REMOTE_CODE, tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prosparse_core import activations, export
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.export import PROMPT, Card, Measurement, export_hf, fatrelu_config
from prosparse_core.families import find_ffns
from prosparse_core.random_model import train_tokenizer
from prosparse_core.remote_code import selfcheck
from prosparse_core.remote_code.configuration_prosparse import ProSparseConfig
from prosparse_core.remote_code.modeling_prosparse import FATReLU
from prosparse_core.substitute import use_thresholds
from prosparse_core.variants import load_model

PER_LAYER = [0.0, 0.02, 0.4]
EXPECTED_FILES = {
    "README.md",
    "config.json",
    "configuration_prosparse.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_prosparse.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(320)


@pytest.fixture(scope="module")
def dense(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny dense model with tokenizer; weights large enough that activations cross the thresholds."""

    def build(model_type: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(model_type) / "model"
        model = tiny(model_type, vocab_size=len(tokenizer), initializer_range=0.4, init_std=0.4, **changes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is cached here, not in the user's home; nothing imported from here stays."""

    def forget() -> None:
        for name in [m for m in sys.modules if m.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        forget()
        yield
        forget()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process of every export: these tests load the folder themselves."""
    monkeypatch.setattr(export, "check_export", lambda *args: None)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def in_memory(folder: Path, thresholds: list[float]) -> Any:
    model, _ = load_model(folder)
    use_thresholds(model, thresholds)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "missing"}))


@pytest.mark.slow
def test_export_is_loaded_bit_for_bit_by_a_fresh_process(dense: Callable[..., Path], tmp_path: Path) -> None:
    model_folder, target = dense("gemma"), tmp_path / "hf"
    export_hf(model_folder, PER_LAYER, target, card="# card\n")  # compares logits in a fresh interpreter

    assert EXPECTED_FILES - {p.name for p in target.iterdir()} == set()
    assert (target / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert not (target / "model.safetensors").samefile(model_folder / "model.safetensors")

    edit_config(target, hidden_act_params=[0.0, 0.02, 0.5])
    with pytest.raises(ProSparseError, match="other logits than the model"):
        export.check_export(model_folder, PER_LAYER, target)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model_type", "thresholds"),
    [*((t, PER_LAYER) for t in MODEL_TYPES), *((t, [0.03]) for t in ("llama", "phi3", "gpt2", "minicpm"))],
)
def test_every_family_gives_the_same_logits_and_tokens(
    dense: Callable[..., Path], tmp_path: Path, model_type: str, thresholds: list[float]
) -> None:
    model_folder = dense(model_type, tie_word_embeddings=len(thresholds) == 1)
    target = tmp_path / "hf"
    export_hf(model_folder, thresholds, target, card="card")
    ours, exported = in_memory(model_folder, thresholds), load(target)

    assert exported.config.model_type == f"prosparse_{model_type}"
    assert exported.config.layer_thresholds() == (thresholds * 3)[:3]
    tokenizers = [AutoTokenizer.from_pretrained(f, trust_remote_code=True) for f in (model_folder, target)]
    ids, same = (t(PROMPT, return_tensors="pt")["input_ids"] for t in tokenizers)
    assert torch.equal(ids, same)
    assert torch.equal(logits(ours, ids), logits(exported, ids))
    dense_model, _ = load_model(model_folder)
    assert not torch.equal(logits(ours, ids), logits(dense_model, ids)), "the thresholds must matter in this test"
    tied = exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert tied == (len(thresholds) == 1)

    AutoModel.from_pretrained(target, trust_remote_code=True)
    assert [f.activation.threshold for f in find_ffns(exported)] == (thresholds * 3)[:3]
    again = tmp_path / "again"
    exported.save_pretrained(again)
    assert torch.equal(logits(load(again), ids), logits(ours, ids))
    trust = {"trust_remote_code": model_type in REMOTE_CODE}
    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, **trust).eval()
    use_thresholds(reference, thresholds)
    assert torch.equal(logits(load(target, dtype=torch.bfloat16), ids), logits(reference, ids))


@pytest.mark.usefixtures("unchecked")
def test_qwen2_attention_bias_travels(dense: Callable[..., Path], tmp_path: Path) -> None:
    model_folder = dense("qwen2")
    model, tokenizer = load_model(model_folder)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.bias)
    model.save_pretrained(model_folder)
    export_hf(model_folder, [0.1], tmp_path / "hf", card="card")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    exported = load(tmp_path / "hf")
    assert exported.model.layers[1].self_attn.q_proj.bias.abs().sum() > 0
    assert torch.equal(logits(exported, ids), logits(in_memory(model_folder, [0.1]), ids))


@pytest.fixture
def exported(unchecked: None, dense: Callable[..., Path], tmp_path: Path) -> Path:
    target = tmp_path / "hf"
    export_hf(dense("llama"), [0.05], target, card="card")
    return target


def test_generates_and_trains_like_the_dense_class(exported: Path) -> None:
    model = load(exported)
    ids = torch.tensor([[5, 6, 7]])
    cached = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    plain = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, plain)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_refuses_to_load_without_its_code(exported: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    with pytest.raises(KeyError, match="fatrelu"):  # the dense class knows no such activation
        LlamaForCausalLM.from_pretrained(exported)
    edit_config(exported, auto_map="missing")
    with pytest.raises(ValueError, match="prosparse_llama"):
        load(exported)


def test_selfcheck_sees_a_folder_that_loads_without_its_code(exported: Path, tmp_path: Path) -> None:
    edit_config(exported, model_type="llama", hidden_act="silu", auto_map="missing")
    with pytest.raises(SystemExit, match="would run without FATReLU"):
        selfcheck.main(str(exported), str(tmp_path / "out"), 1, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu': these weights were trained for FATReLU"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_act": "missing"}, "hidden_act is ''"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation is 'gelu_pytorch_tanh'"),
        ({"hidden_act_param": "missing"}, "either as hidden_act_param"),
        ({"hidden_act_param": None}, "either as hidden_act_param"),
        ({"hidden_act_params": PER_LAYER}, "either as hidden_act_param"),
        ({"hidden_act_param": None, "hidden_act_params": [0.1, 0.1]}, "2 hidden_act_params for a model of 3 layers"),
        ({"hidden_act_param": None, "hidden_act_params": [0.1, None, 0.1]}, "finite numbers of at least 0"),
        ({"hidden_act_param": -0.01}, "finite numbers of at least 0"),
        ({"hidden_act_param": math.nan}, "finite numbers of at least 0"),
        ({"hidden_act_param": math.inf}, "finite numbers of at least 0"),
        ({"hidden_act_param": "0.05"}, "finite numbers of at least 0"),
        ({"hidden_act_param": True}, "finite numbers of at least 0"),
    ],
)
def test_broken_config_refuses_to_load(exported: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(exported, **changes)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(exported, trust_remote_code=True)


def test_an_activation_changed_on_the_way_refuses_to_run(exported: Path) -> None:
    with pytest.raises(ValueError, match="hidden_act is 'silu'"):
        load(exported, hidden_act="silu")
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    config.hidden_act = "silu"
    with pytest.raises(ValueError, match="hidden_act is 'silu'"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def test_config_keys_are_the_published_ones() -> None:
    dense_config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_act": "silu", "_name_or_path": "x"}
    one = fatrelu_config(dense_config, [0.01])
    assert (one["hidden_act"], one["hidden_act_param"]) == ("fatrelu", 0.01)
    assert "hidden_act_params" not in one
    assert "_name_or_path" not in one
    assert fatrelu_config(dense_config, [0.01] * 3) == one
    many = fatrelu_config(dense_config, PER_LAYER)
    assert many["hidden_act_params"] == PER_LAYER
    assert "hidden_act_param" not in many  # a reader that knows one threshold only must fail
    gemma2 = fatrelu_config({**dense_config, "model_type": "gemma2"}, [0])
    assert (gemma2["hidden_act"], gemma2["hidden_activation"]) == ("fatrelu", "fatrelu")
    ProSparseConfig(**{k: v for k, v in one.items() if k != "model_type"})


@pytest.mark.parametrize("thresholds", [[], [0.1, 0.1], [0.1] * 4])
def test_wrong_number_of_thresholds(dense: Callable[..., Path], tmp_path: Path, thresholds: list[float]) -> None:
    with pytest.raises(BadInput, match=f"{len(thresholds)} thresholds for a model of 3 layers"):
        export_hf(dense("llama"), thresholds, tmp_path / "hf", card="card")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_impossible_threshold(threshold: float) -> None:
    with pytest.raises(BadInput, match="finite thresholds of at least 0"):
        fatrelu_config({"model_type": "llama", "num_hidden_layers": 2}, [threshold])


def test_unusable_folders_are_refused_before_anything_is_written(dense: Callable[..., Path], tmp_path: Path) -> None:
    model_folder = dense("llama")
    with pytest.raises(BadInput, match="exists already"):
        export_hf(model_folder, [0.1], tmp_path, card="card")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no safetensors weights"):
        export_hf(model_folder, [0.1], tmp_path / "hf", card="card")
    edit_config(model_folder, model_type="prosparse_llama")
    with pytest.raises(BadInput, match="this pipeline exported"):
        export_hf(model_folder, [0.1], tmp_path / "hf", card="card")
    assert not (tmp_path / "hf").exists()


def test_a_failed_check_leaves_nothing_behind(
    dense: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ProSparseError("other logits")

    monkeypatch.setattr(export, "check_export", fail)
    with pytest.raises(ProSparseError, match="other logits"):
        export_hf(dense("llama"), [0.1], tmp_path / "hf", card="card")
    assert not (tmp_path / "hf").exists()


def test_a_failing_process_says_what_it_wrote_last() -> None:
    with pytest.raises(ProSparseError, match=r"(?s)looking in a fresh process failed \(exit code 3\).*the end"):
        export.run_fresh(["-c", "import sys; print('the end', file=sys.stderr); sys.exit(3)"], what="looking")
    assert export.run_fresh(["-c", "print(input())"], stdin="é", what="echo").strip() == "é"


@given(
    x=st.lists(st.floats(width=32), min_size=1, max_size=20),
    threshold=st.one_of(st.just(0.0), st.floats(0, 10)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_shipped_fatrelu_is_the_method_s_own(x: list[float], threshold: float, dtype: torch.dtype) -> None:
    values = torch.tensor([*x, threshold, -threshold, -0.0]).to(dtype)
    ours, shipped = activations.FATReLU(threshold)(values), FATReLU(threshold)(values)
    assert shipped.dtype == dtype
    torch.testing.assert_close(shipped, ours, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(shipped.signbit(), ours.signbit())


def test_threshold_is_compared_in_the_dtype_of_the_activation() -> None:
    boundary = torch.tensor([0.7], dtype=torch.bfloat16)
    assert float(boundary) < 0.7  # rounded down, yet kept: it equals the threshold in its own dtype
    assert torch.equal(FATReLU(0.7)(boundary), boundary)


def make_card(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "model": "owner/Model-1B",
        "base_model": "owner/Model-1B",
        "setting": "prosparse",
        "config": {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 21},
        "thresholds": [0.0625],
        "tokens_seen": 123_456,
        "recipe": "tiny",
        "stages": [{"until_step": 7, "l1": 0.25, "ramp": "sine", "phase": "prosparse"}],
        "results": [
            Measurement("original", {"code": 12.3456, "mixed": None}, {"code": 0.0}),
            Measurement("prosparse", {"code": 13.5}, {"code": 0.891234, "mixed": 0.5}),
        ],
        "lineage": {"checkpoint": "ab" * 32, "thresholds": None},
        "versions": {"torch": "9.9"},
        **changes,
    }
    return Card(**fields).render()


def test_card_shows_the_data_and_nothing_else() -> None:
    card = make_card()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "base_model": "owner/Model-1B",
        "base_model_relation": "finetune",
        "tags": ["prosparse", "sparse-activations", "fatrelu", "llama"],
    }
    assert "| code | 12.346 | 0.00 % | 13.500 | 89.12 % |" in text
    assert "| mixed | n/a | n/a | n/a | 50.00 % |" in text
    assert "| 0 | 7 | 0.25 | sine | prosparse |" in text
    assert "`hidden_act_param: 0.0625`" in text
    assert f"`{'ab' * 32}`" in text
    assert "| thresholds | `n/a` |" in text
    assert "trust_remote_code=True" in text
    assert not re.search(r"20\d\d-\d\d", card), "no dates: the same data give the same bytes"
    assert card == make_card()
    assert "owner/Model-1B with sparse FFN activations" in text
    assert "| Weights that training began with | precision not recorded |" in text


def test_card_says_in_which_precision_the_weights_came() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 21}
    card = make_card(config={**config, "prosparse_source_precision": "Q4_1 dequantised"})
    assert "owner/Model-1B, Q4_1 dequantised, with sparse FFN activations" in card
    assert "| Weights that training began with | Q4_1 dequantised |" in card
    assert (
        fatrelu_config({**config, "prosparse_source_precision": "bf16"}, [0.1])["prosparse_source_precision"] == "bf16"
    )


def test_card_without_hub_id_or_measurements() -> None:
    card = make_card(base_model=None, results=[], thresholds=[0.0, 0.125, 0.5])
    assert "base_model" not in card
    assert "n/a: nothing was measured" in card
    assert "`[0.0, 0.125, 0.5]`" in card
    assert "0.0 to 0.5" in card
