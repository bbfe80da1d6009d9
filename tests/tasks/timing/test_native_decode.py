"""The native decoder computes what transformers computes: every family, rotation and activation, or it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import cpu
from kernels.decoder import Decoder
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.perplexity import measure
from prosparse_core.prediction.mask import PredictedMask
from prosparse_core.predictor import LayerPredictor
from prosparse_core.substitute import use_thresholds
from tasks.timing.native_decode import native_model, rotations

THRESHOLDS = [0.0, 0.02, 0.05]


def make(model_type: str = "llama", thresholds: list[float] | None = THRESHOLDS, **changes: Any) -> Any:
    """A random model with FATReLU, or with its own activation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 53, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "initializer_range": 0.2, **changes,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 1.0, 0.2)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.2)
    if thresholds is not None:
        use_thresholds(model, thresholds)
    return model


@pytest.fixture(autouse=True)
def _native() -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)


def text(count: int, seed: int = 3) -> Tensor:
    return torch.randint(1, 96, (1, count), generator=torch.Generator().manual_seed(seed))


SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True},
    "linear rope": {"rope_parameters": SCALED},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "silu": {"thresholds": None},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logits_are_those_of_transformers(name: str) -> None:
    model, prompt = make(**MODELS[name]), text(11)
    with torch.no_grad():
        expected = model(input_ids=text(40)).logits[0]
    ids = model.generate(prompt, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 11:]
    packed = native_model(model, capacity=40, dtype=torch.float32)
    for ffn in ("dense",) if name == "silu" else ("dense", "exact", "certified"):
        decoder = Decoder(packed, ffn=ffn)
        torch.testing.assert_close(decoder.score(text(40)[0].tolist()), expected, rtol=1e-4, atol=2e-4)
        decoder.rewind()
        assert list(decoder.generate(prompt[0].tolist(), 25)) == ids.tolist()


def test_an_end_of_sequence_token_ends_as_in_transformers() -> None:
    model, prompt = make(), text(7)
    free = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    end = free[9]
    ids = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0)[0, 7:].tolist()
    decoder = Decoder(native_model(model, capacity=40, dtype=torch.float32))
    assert list(decoder.generate(prompt[0].tolist(), 20, stop={end})) == ids
    assert ids[-1] == end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_perplexity_is_that_of_the_rounded_model(dtype: torch.dtype) -> None:
    """1e-4 relative, whichever way the FFN goes."""
    model, window = make(thresholds=[0.0, 0.0, 0.0]), text(40)
    packed = native_model(model, capacity=40, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype).float()
    expected = measure(model, window, window, precision="fp32", batch_size=1).perplexity
    for ffn in ("dense", "exact", "certified"):
        logits = Decoder(packed, ffn=ffn).score(window[0].tolist())
        found = math.exp(nn.functional.cross_entropy(logits[:-1].double(), window[0, 1:]))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
def test_predicted_neurons_are_those_of_the_mask(source: Any) -> None:
    model, cutoffs = make(), [0.45, 0.5, 0.55]
    predictors = [LayerPredictor(32, 53, 7, torch.Generator().manual_seed(i)) for i in range(3)]
    packed = native_model(model, capacity=40, dtype=torch.float32, predictors=predictors, source=source)
    with PredictedMask(model, predictors, cutoffs, source), torch.no_grad():
        expected = model(input_ids=text(20)).logits[0]
    found = Decoder(packed, ffn="predicted", cutoffs=cutoffs).score(text(20)[0].tolist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        assert not torch.allclose(found, model(input_ids=text(20)).logits[0], atol=1e-2), "the mask changes something"


@pytest.mark.parametrize("model_type", ["gemma", "olmo2", "granite"])
def test_other_architectures_are_refused(model_type: str) -> None:
    with pytest.raises(BadInput, match=f"does not compute architecture '{model_type}'"):
        native_model(make(model_type, bos_token_id=1, eos_token_id=2), capacity=8, dtype=torch.float32)


def test_what_the_decoder_cannot_compute_is_refused() -> None:
    with pytest.raises(BadInput, match="a cache of 65 positions for a model of 64"):
        native_model(make(), capacity=65, dtype=torch.float32)
    with pytest.raises(BadInput, match="no exact zeros to skip"):
        native_model(make(thresholds=None, hidden_act="gelu"), capacity=8, dtype=torch.float32)
    with pytest.raises(BadInput, match="an FFN with a bias"):
        native_model(make(thresholds=None, mlp_bias=True), capacity=8, dtype=torch.float32)
    model = make()
    model.model.layers[1].self_attn.v_proj.weight.data[3, 4] = math.nan
    with pytest.raises(BadInput, match="layer 1: qkv holds a number that is not finite"):
        native_model(model, capacity=8, dtype=torch.float32)


def test_a_rotation_that_depends_on_the_length_is_refused() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    rotary = make(rope_parameters=dynamic, max_position_embeddings=16).model.rotary_emb
    cos, sin = rotations(rotary, 16)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(16, 10))
    with pytest.raises(BadInput, match="'dynamic' turns early positions differently"):
        rotations(rotary, 40)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_failure", "native kernels: no C++ compiler on the PATH")
    with pytest.raises(EnvironmentProblem, match="no C\\+\\+ compiler"):
        native_model(make(), capacity=8, dtype=torch.float32)
