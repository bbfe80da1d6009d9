"""Folders for readers that know nothing of us: what they would compute, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny, tokens
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_core.activations import FATReLU
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.formats.plain import export_hf_relu, export_vllm, minicpm_config, refuse_vllm, strictly_above
from prosparse_core.random_model import train_tokenizer
from prosparse_core.store import Artifact
from prosparse_core.substitute import use_relu
from prosparse_core.thresholds import THRESHOLDS
from prosparse_core.variants import Variant, load_variant

IDS = tokens(vocab=300, length=20)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(320)


def checkpoint(folder: Path, tokenizer: Any, model_type: str = "llama", **changes: Any) -> Artifact:
    model = tiny(model_type, vocab_size=len(tokenizer), initializer_range=0.3, **changes)
    use_relu(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Artifact("stage", "s", "0" * 64, "1" * 64, folder)


def make(folder: Path, tokenizer: Any, thresholds: list[float] | None = None, best: Any = None, **more: Any) -> Variant:
    where = checkpoint(folder / "checkpoint", tokenizer, **more)
    if thresholds is None:
        return Variant("prosparse_star", where, "relu")
    (folder / "t").mkdir()
    (folder / "t" / THRESHOLDS).write_text(json.dumps({"per_layer": thresholds, "threshold": best}))
    return Variant("prosparse", where, "fatrelu", Artifact("calibrate", "c", "2" * 64, "3" * 64, folder / "t"))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def as_minicpm(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """MiniCPM as its published code and vLLM compute it, from nothing but the folder."""
    c, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    heads, kv, length = c["num_attention_heads"], c["num_key_value_heads"], ids.shape[1]
    width, block = c["hidden_size"] // heads, c["scale_depth"] / math.sqrt(c["num_hidden_layers"])
    angle = torch.outer(torch.arange(length), c["rope_theta"] ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]) * w[f"model.{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    x = w["model.embed_tokens.weight"][ids] * c["scale_emb"]
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = ((y @ w[f"model.{at}.self_attn.{n}_proj.weight"].T) for n in "qkv")
        q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (rotate(k), v))
        y = torch.nn.functional.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ w[f"model.{at}.self_attn.o_proj.weight"].T * block
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ w[f"model.{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        assert c["hidden_act"] == "fatrelu"
        y = torch.nn.functional.threshold(gate, c["hidden_act_param"], 0.0) * up
        x = x + y @ w[f"model.{at}.mlp.down_proj.weight"].T * block
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "norm") / (c["hidden_size"] / c["dim_model_base"]) @ head.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thresholds", [None, [0.05] * 3, [0.4] * 3])
def test_minicpms_form_computes_the_same(
    tmp_path: Path, tokenizer: Any, thresholds: list[float] | None, tied: bool
) -> None:
    variant = make(tmp_path, tokenizer, thresholds, rope_theta=500.0, tie_word_embeddings=tied)
    found = export_vllm(variant, tmp_path / "vllm", strict=True)
    assert found.threshold == (thresholds or [0.0])[0]
    assert found.notes == ()
    model, _ = load_variant(variant)
    expected = logits(model)
    assert torch.allclose(as_minicpm(found.target, IDS), expected, rtol=1e-3, atol=1e-3)
    if thresholds:
        plain, _ = load_variant(Variant("star", variant.checkpoint, "relu"))
        assert float((logits(plain) - expected).abs().max()) > 0.05, "the threshold must matter in this test"
    readme = (found.target / "README.md").read_text()
    assert "vllm serve vllm --dtype float32" in readme


def test_transformers_refuses_that_folder_and_reads_its_config(tmp_path: Path, tokenizer: Any) -> None:
    target = export_vllm(make(tmp_path, tokenizer, [0.1] * 3, rope_theta=500.0), tmp_path / "vllm").target
    config = AutoConfig.from_pretrained(target)
    assert (config.scale_emb, config.dim_model_base, config.hidden_act) == (1, 32, "fatrelu")
    assert config.hidden_act_param == strictly_above(0.1)
    assert config.architectures == ["MiniCPMForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 500.0
    with pytest.raises(KeyError, match="fatrelu"):
        AutoModelForCausalLM.from_pretrained(target)


def test_the_three_factors_are_one() -> None:
    base = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9}
    for num_layers in range(1, 200):
        config = json.loads(json.dumps(minicpm_config({**base, "num_hidden_layers": num_layers}, 0.01)))
        assert config["scale_depth"] / math.sqrt(config["num_hidden_layers"]) == 1.0
        assert config["hidden_size"] / config["dim_model_base"] == 1.0
        assert config["scale_emb"] == 1
        assert config["rope_theta"] == 10000.0


@given(st.floats(0, 10, width=32), st.integers(-3, 3))
def test_the_boundary_is_kept(threshold: float, steps: int) -> None:
    """x > u exactly where x >= t, around t itself, as torch compares 32-bit floats."""
    x = np.float32(threshold)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.float32(math.copysign(np.inf, steps)))
    value = torch.tensor([float(x)])
    ours = torch.where(value >= threshold, value, 0.0) if threshold else torch.relu(value)
    theirs = torch.nn.functional.threshold(value, strictly_above(threshold), 0.0)
    assert torch.equal(ours.abs(), theirs.abs())


def fatrelu_and_mul(gate_up: torch.Tensor, threshold: float) -> torch.Tensor:
    """The rule of vLLM's operator of that name, its forward_native."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.threshold(gate, threshold, 0.0) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.109, 0.178])
def test_vllm_s_operator_differs_where_the_readme_says(dtype: torch.dtype, threshold: float) -> None:
    """Every positive number of 16 bits below 1, and as many 32-bit ones around the threshold."""
    if dtype is torch.float32:
        middle = torch.tensor(threshold).view(torch.int32)
        gate = (middle + torch.arange(-3000, 3000, dtype=torch.int32)).clamp_min(0).view(dtype)
    else:
        gate = torch.arange(0x3C00 if dtype is torch.float16 else 0x3F80, dtype=torch.int16).view(dtype)
    ours = FATReLU(threshold)(gate)
    theirs = fatrelu_and_mul(torch.cat([gate, torch.ones_like(gate)]), strictly_above(threshold))
    differs = gate[ours != theirs]
    rounded = float(torch.tensor(threshold, dtype=dtype))
    is_below = dtype is not torch.float32 and rounded < threshold
    assert differs.tolist() == ([rounded] if is_below else []), "the rounded threshold alone, where that is less"


def test_layers_that_differ_fall_back_aloud_or_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    variant = make(tmp_path, tokenizer, [0.0, 0.1, 0.2], best=0.07)
    with pytest.raises(BadInput, match=r"--strict: vLLM has one threshold for all layers: 0\.07, the best such"):
        export_vllm(variant, tmp_path / "vllm", strict=True)
    assert not (tmp_path / "vllm").exists()
    found = export_vllm(variant, tmp_path / "vllm")
    assert found.threshold == 0.07
    assert "instead of 0 to 0.2 by layer" in found.notes[0]
    assert found.notes[0] in (found.target / "README.md").read_text()
    assert json.loads((found.target / "config.json").read_text())["hidden_act_param"] == strictly_above(0.07)


def test_without_a_threshold_for_all_layers_it_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="one threshold per layer and no global one"):
        export_vllm(make(tmp_path, tokenizer, [0.0, 0.1, 0.2]), tmp_path / "vllm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "architecture qwen2"),
        ({"attention_bias": True}, "projections with a bias"),
        ({"mlp_bias": True}, "projections with a bias"),
        ({"head_dim": 16}, "heads of 16 numbers where d_model / heads is 8"),
        ({"sliding_window": 64}, "a sliding window of 64 tokens"),
        ({"model_type": "gemma", "head_dim": 16}, "architecture gemma"),
    ],
)
def test_where_minicpms_form_is_not_exact(changes: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
    refuse_vllm(config)
    with pytest.raises(BadInput, match=message):
        refuse_vllm({**config, **changes})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_plain_relu_runs_in_transformers_itself(tmp_path: Path, tokenizer: Any, model_type: str) -> None:
    variant = make(tmp_path, tokenizer, model_type=model_type)
    found = export_hf_relu(variant, tmp_path / "relu", strict=True)
    model, _ = load_variant(variant)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(found.target).eval()), logits(model))
    assert not list(found.target.glob("*.py"))


def test_thresholds_of_zero_are_plain_relu_and_others_are_left_out_aloud(tmp_path: Path, tokenizer: Any) -> None:
    variant = make(tmp_path, tokenizer, [0.0, 0.1, 0.2])
    with pytest.raises(BadInput, match=r"--strict: thresholds \(0 to 0\.2\) are left out"):
        export_hf_relu(variant, tmp_path / "relu", strict=True)
    found = export_hf_relu(variant, tmp_path / "relu")
    assert "prosparse_star" in found.notes[0]
    (tmp_path / "zero").mkdir()
    assert export_hf_relu(make(tmp_path / "zero", tokenizer, [0.0] * 3), tmp_path / "r0", strict=True).notes == ()


def test_a_folder_that_computes_something_else_does_not_stay(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = make(tmp_path, tokenizer)
    path = variant.checkpoint.path / "model" / "config.json"
    monkeypatch.setattr("prosparse_core.substitute.use_relu", lambda model: use_thresholds_instead(model))
    with pytest.raises(ProSparseError, match="transformers computes other logits"):
        export_hf_relu(variant, tmp_path / "relu")
    assert not (tmp_path / "relu").exists()
    assert json.loads(path.read_text())["hidden_act"] == "relu"


def use_thresholds_instead(model: Any) -> int:
    from prosparse_core.substitute import use_thresholds

    return use_thresholds(model, [0.3])


@pytest.mark.parametrize("activation", ["original", "shifted_relu", "drelu"])
def test_other_activations_and_targets_that_exist_are_refused(tmp_path: Path, tokenizer: Any, activation: str) -> None:
    where = checkpoint(tmp_path, tokenizer)
    for export in (export_hf_relu, export_vllm):
        with pytest.raises(BadInput, match=f"other runs {activation}; only ReLU and FATReLU"):
            export(Variant("other", where, activation), tmp_path / "x")
        with pytest.raises(BadInput, match="is there already"):
            export(Variant("star", where, "relu"), tmp_path)
