"""Every family: the swap is complete, undoable, local to the instance, and x1 is what the formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny, tokens
from transformers import AutoModelForCausalLM

from prosparse_core.activations import FATReLU, ReLU
from prosparse_core.errors import BadInput
from prosparse_core.families import FAMILIES, family_of, find_ffns, require_family
from prosparse_core.substitute import substitute, use_relu, use_thresholds

MODEL_TYPES = [t for f in FAMILIES for t in f.model_types]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_swapped_whole_and_back(model_type: str) -> None:
    model, x = tiny(model_type), tokens()
    other = tiny(model_type)
    with torch.no_grad():
        before = model(input_ids=x).logits
        originals = [f.activation for f in find_ffns(model)]
        assert use_relu(model) == model.config.num_hidden_layers
        assert not torch.equal(model(input_ids=x).logits, before)
        assert torch.equal(other(input_ids=x).logits, before), "another instance must stay as it is"
        substitute(model, lambda layer: originals[layer])
        assert torch.equal(model(input_ids=x).logits, before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_x1_is_act_of_gate_times_up(model_type: str) -> None:
    model = tiny(model_type)
    use_relu(model)
    seen: dict[str, torch.Tensor] = {}
    ffn = find_ffns(model)[1]
    handles = [
        ffn.gate.register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0])),
        ffn.down.register_forward_pre_hook(lambda m, a: seen.__setitem__("x1", a[0])),
    ]
    with torch.no_grad():
        model(input_ids=tokens())
        expected = torch.relu(seen["x"] @ ffn.gate.weight.T) * (seen["x"] @ ffn.up.weight.T)
    for handle in handles:
        handle.remove()
    assert torch.allclose(seen["x1"], expected, atol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_saved_relu_model_runs_relu_after_a_plain_reload(model_type: str, tmp_path: Path) -> None:
    model, x = tiny(model_type), tokens()
    use_relu(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)


def test_thresholds_per_layer() -> None:
    model = tiny()
    use_thresholds(model, [0.0, 0.1, 0.2])
    assert [f.activation.threshold for f in find_ffns(model)] == [0.0, 0.1, 0.2]
    use_thresholds(model, [0.05])
    assert all(isinstance(f.activation, FATReLU) and f.activation.threshold == 0.05 for f in find_ffns(model))
    with pytest.raises(BadInput, match="2 thresholds for a model of 3 layers"):
        use_thresholds(model, [0.1, 0.2])


def test_an_unknown_family_names_what_looks_like_an_ffn() -> None:
    model = tiny()
    model.config.model_type = "novel"
    with pytest.raises(BadInput) as caught:
        find_ffns(model)
    assert "'novel'" in str(caught.value)
    assert "model.layers.0.mlp" in str(caught.value)
    assert "families.py" in (caught.value.hint or "")


def test_family_lookup() -> None:
    assert family_of("mistral") is FAMILIES[0]
    assert family_of("novel") is None
    with pytest.raises(BadInput, match=r"model\.source: architecture 'novel'"):
        require_family("novel", where="model.source")


def test_a_layer_without_a_part_is_refused() -> None:
    model = tiny()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(BadInput, match="layer 1"):
        substitute(model, lambda layer: ReLU())
