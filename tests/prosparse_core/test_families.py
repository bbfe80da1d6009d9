"""Every family: swapped whole and back, x1 as the formula says, saved and loaded, regularized, metered and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, REMOTE_CODE, tiny, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from prosparse_core import families
from prosparse_core.activations import FATReLU, ReLU
from prosparse_core.errors import BadInput
from prosparse_core.families import FAMILIES, FAMILY_KEY, LLAMA, Family, family_of, find_ffns, register, require_family
from prosparse_core.family import FFN, Sizes
from prosparse_core.prediction.recording import record
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import substitute, use_activation, use_relu, use_thresholds

DENSE = {"opt": {"activation_function": "gelu"}}
"""Architectures that come with ReLU get another activation, so that the swap changes something."""


def make(model_type: str) -> Any:
    """With weights large enough to matter, and biases that are not all zero."""
    model = tiny(model_type, **DENSE.get(model_type, {}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ffn in find_ffns(model):
            for name, weight in ffn.module.named_parameters():
                if name.split(".")[0] in (ffn.family.gate, ffn.family.up, ffn.family.gate_up, ffn.family.down):
                    weight.normal_(std=0.2, generator=generator)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


@contextmanager
def watched(ffn: FFN) -> Iterator[dict[str, Tensor]]:
    """x and x1 of the forward passes inside, [tokens, ...]."""
    seen: dict[str, Tensor] = {}
    handles = [
        ffn.first.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].flatten(0, -2))),
        ffn.down.register_forward_pre_hook(lambda m, a: seen.update(x1=a[0].flatten(0, -2))),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def by_hand(ffn: FFN, x: Tensor) -> Tensor:
    """x1 of a ReLU FFN from the names of its family alone, without FFN's views."""

    def projected(name: str) -> Tensor:
        module: Any = ffn.module.get_submodule(name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        return torch.nn.functional.linear(x, weight, getattr(module, "bias", None))

    family = ffn.family
    if family.gate_up is not None:
        gate, up = projected(family.gate_up).chunk(2, -1)
        return torch.relu(gate) * up
    assert family.up is not None
    return torch.relu(projected(family.up)) if family.gate is None else (
        torch.relu(projected(family.gate)) * projected(family.up)
    )  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    model, other = make(model_type), make(model_type)
    ffns = find_ffns(model)
    family = ffns[0].family
    assert family.sizes(model.config) == Sizes(3, ffns[0].d_model, ffns[0].d_ff) == Sizes(3, 32, ffns[0].d_ff)
    assert ffns[0].d_ff == (53 if family.d_ff_key else 128)

    # Swapped whole, on this instance only, and back.
    before, originals = logits(model), [f.activation for f in ffns]
    assert use_relu(model) == len({id(f.activation) for f in ffns}) == 3
    relu = logits(model)
    assert not torch.equal(relu, before)
    assert torch.equal(logits(other), before)
    substitute(model, lambda layer: originals[layer])
    assert torch.equal(logits(model), before)

    # x1 is what the formula says; the meter and the recording see the same.
    use_relu(model)
    ffn = find_ffns(model)[1]
    with watched(ffn) as seen, SparsityMeter(model) as meter:
        assert torch.equal(logits(model), relu)
    with torch.no_grad():
        torch.testing.assert_close(seen["x1"], by_hand(ffn, seen["x"]), atol=1e-5, rtol=1e-4)
    zeros = float((seen["x1"] == 0).double().mean())
    assert 0.2 < zeros < 0.8
    assert meter.layers()[1].sparsity == pytest.approx(zeros)
    recorded = record(model, [tokens()], num_tokens=32, precision="fp32", dtype=torch.float32).layers[1]
    assert torch.equal(recorded.active(), seen["x1"] != 0)
    assert torch.equal(recorded.inputs, seen["x"])

    # A threshold is one on what the activation sees.
    use_thresholds(model, [0.05])
    with watched(find_ffns(model)[0]) as shifted:
        logits(model)
    use_relu(model)
    with watched(find_ffns(model)[0]) as plain:
        logits(model)
    assert 0 < int((shifted["x1"] != 0).sum()) < int((plain["x1"] != 0).sum())

    _saved_and_loaded(model, relu, before, tmp_path)
    _regularized(model)


def _saved_and_loaded(model: Any, relu: Tensor, dense: Tensor, folder: Path) -> None:
    """A plain reload runs ReLU, except where the architecture's code fixes the activation: that is ours to put in."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=model.config.model_type in REMOTE_CODE)
    family = family_of(model.config)
    assert family is not None
    if family.act_is_built_in:
        assert torch.equal(logits(again), dense)
        use_relu(again)
    assert torch.equal(logits(again), relu)


def _regularized(model: Any) -> None:
    """One step along the penalty's gradient alone lowers it."""
    with L1Regularizer(model, L1Reduction()) as regularizer:
        regularizer.l1_lambda = 1.0
        (model(input_ids=tokens(), use_cache=False).logits.sum() * 0).backward()
        before, _, sparsity = regularizer.collect()
        gradients = [(w, w.grad) for w in model.parameters() if w.grad is not None]
        size = sum(float(g.square().sum()) for _, g in gradients)
        with torch.no_grad():
            for weight, gradient in gradients:
                weight -= 0.01 * before / size * gradient  # 1 % of the penalty, to first order
        logits(model)
        after, _, _ = regularizer.collect()
    assert 0.2 < sparsity < 0.8
    assert after == pytest.approx(0.99 * before, rel=3e-3)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_weights_are_views_in_one_orientation(model_type: str) -> None:
    model = make(model_type)
    ffn = find_ffns(model)[0]
    shapes = {"up_weight": (53, 32), "act_weight": (53, 32), "down_weight": (32, 53)}
    for name, shape in shapes.items():
        weight = getattr(ffn, name)
        assert tuple(weight.shape) == shape
    assert (ffn.gate_weight is None) == (not ffn.family.is_gated)
    before = logits(model)
    with torch.no_grad():
        ffn.up_weight.mul_(2)
    assert not torch.equal(logits(model), before), "a change of a view is a change of the model"
    assert ffn.biases == ([] if ffn.family.is_gated else ["up", "down"])


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_drelu_of_both_gated_layouts(model_type: str) -> None:
    model = make(model_type)
    use_activation(model, "drelu")
    ffn = find_ffns(model)[0]
    with watched(ffn) as seen, torch.no_grad():
        logits(model)
        gate = torch.relu(seen["x"] @ ffn.act_weight.T)
        expected = gate * torch.relu(seen["x"] @ ffn.up_weight.T)
    torch.testing.assert_close(seen["x1"], expected, atol=1e-6, rtol=1e-4)
    assert model.config.hidden_act == "prosparse_drelu"


def test_drelu_without_a_gate_is_refused() -> None:
    with pytest.raises(BadInput, match="family gpt2 has no gate"):
        use_activation(tiny("gpt2"), "drelu")


def test_thresholds_per_layer() -> None:
    model = tiny()
    use_thresholds(model, [0.0, 0.1, 0.2])
    assert [f.activation.threshold for f in find_ffns(model)] == [0.0, 0.1, 0.2]
    use_thresholds(model, [0.05])
    assert all(isinstance(f.activation, FATReLU) and f.activation.threshold == 0.05 for f in find_ffns(model))
    with pytest.raises(BadInput, match="2 thresholds for a model of 3 layers"):
        use_thresholds(model, [0.1, 0.2])


@pytest.mark.parametrize(
    ("model_type", "line", "guess"),
    [
        (
            "llama",
            "model.layers.0.mlp: gate_proj [53, 32], up_proj [53, 32], down_proj [32, 53], act_fn SiLUActivation",
            "{layers: model.layers, ffn: mlp, gate: gate_proj, up: up_proj, down: down_proj, act: act_fn}",
        ),
        (
            "phi3",
            "model.layers.0.mlp: gate_up_proj [106, 32], down_proj [32, 53], activation_fn SiLUActivation",
            "{layers: model.layers, ffn: mlp, gate_up: gate_up_proj, down: down_proj, act: activation_fn}",
        ),
        (
            "gpt2",
            "transformer.h.0.mlp: c_fc [53, 32], c_proj [32, 53], act NewGELUActivation",
            "{layers: transformer.h, ffn: mlp, up: c_fc, down: c_proj, act: act}",
        ),
        ("opt", "model.decoder.layers.0: fc1 [53, 32], fc2 [32, 53], activation_fn ReLU", 'ffn: "", up: fc1'),
    ],
)
def test_an_unknown_family_names_what_looks_like_an_ffn_and_how_to_register_it(
    model_type: str, line: str, guess: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type)
    monkeypatch.setattr(families, "FAMILIES", ())
    with pytest.raises(BadInput) as caught:
        find_ffns(model)
    assert f"architecture {model_type!r} is of no known FFN family" in str(caught.value)
    assert line in str(caught.value)
    hint = caught.value.hint or ""
    assert guess in hint
    assert "model.family" in hint
    with pytest.raises(BadInput) as from_config:  # modules are built without weights where there is only a config
        require_family(model.config.to_dict(), where="folder")
    assert line in str(from_config.value)


def test_a_family_may_be_registered_or_described_in_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(families, "FAMILIES", ())
    monkeypatch.setattr(families, "_registered", [])
    entry = {"layers": "model.layers", "ffn": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    model = tiny()
    model.config.prosparse_family = {**entry, "act": "act_fn"}
    assert use_relu(model) == 3
    model.save_pretrained(tmp_path)  # the description travels with the weights
    assert len(find_ffns(AutoModelForCausalLM.from_pretrained(tmp_path))) == 3

    with pytest.raises(BadInput, match="no model_types"):
        register(Family(**entry, act="act_fn"))
    register(Family(name="mine", model_types=("llama",), **entry, act="act_fn"))
    found = family_of({"model_type": "llama"})
    assert found is not None
    assert found.name == "mine"
    assert len(find_ffns(tiny())) == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"layers": "model.layers", "ffn": "mlp", "up": "fc1", "dwon": "fc2", "act": "act"}, "did you mean 'down'"),
        ({"layers": "model.layers", "ffn": "mlp", "gate": "fc1", "down": "fc2", "act": "act"}, "given: gate"),
        ("llama", "prosparse_family"),
    ],
)
def test_a_description_that_is_none_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        family_of({"model_type": "novel", FAMILY_KEY: raw})


def test_a_description_that_does_not_fit_says_where() -> None:
    entry = {"layers": "model.layers", "ffn": "mlp", "gate": "gate_proj", "up": "up_proj", "act": "act_fn"}
    for changes, message in (
        ({"layers": "model.blocks", "down": "down_proj"}, "lacks the layers of family custom"),
        ({"down": "up_proj"}, "layer 0 of LlamaForCausalLM does not fit family custom"),
        ({"down": "wd"}, "layer 0 of LlamaForCausalLM lacks a part of family custom"),
    ):
        model = tiny()
        model.config.prosparse_family = {**entry, **changes}
        with pytest.raises(BadInput, match=message):
            find_ffns(model)


def test_a_config_under_which_the_modules_are_not_called_is_refused() -> None:
    with pytest.raises(BadInput, match="slow_but_exact is True"):
        find_ffns(tiny("bloom", slow_but_exact=True))
    with pytest.raises(BadInput, match="pretraining_tp is 2"):
        require_family({"model_type": "minicpm", "pretraining_tp": 2}, where="folder")


def test_family_lookup() -> None:
    assert family_of({"model_type": "mistral"}) is LLAMA
    assert family_of({"model_type": "novel"}) is None
    with pytest.raises(BadInput, match=r"model\.source: architecture 'novel'"):
        require_family({"model_type": "novel"}, where="model.source")
    names = [t for f in FAMILIES for t in f.model_types]
    assert len(names) == len(set(names)), "an architecture has one entry"


def test_a_layer_without_a_part_is_refused() -> None:
    model = tiny()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(BadInput, match="layer 1"):
        substitute(model, lambda layer: ReLU())
