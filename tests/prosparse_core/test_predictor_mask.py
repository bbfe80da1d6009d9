"""Masks against x1 zeroed by hand, and the two inputs a predictor can read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny, tokens

from prosparse_core.errors import BadInput
from prosparse_core.families import FAMILIES, find_ffns
from prosparse_core.predictor import LayerPredictor
from prosparse_core.predictor_input import Input, input_module, norm_before, norm_scale
from prosparse_core.predictor_mask import PredictedMask, logit
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import use_relu

MODEL_TYPES = [t for family in FAMILIES for t in family.model_types]


def make(model_type: str = "llama") -> tuple[Any, list[LayerPredictor]]:
    model = tiny(model_type, initializer_range=0.3)
    use_relu(model)
    return model, [LayerPredictor(32, 53, 9, torch.Generator().manual_seed(i)) for i in range(3)]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "olmo2"])
def test_the_norm_before_the_ffn_gives_what_gate_takes(model_type: str) -> None:
    model, _ = make(model_type)
    seen: dict[str, torch.Tensor] = {}
    ffn = find_ffns(model)[1]
    norm = norm_before(model, ffn)
    assert input_module(model, ffn, "pre_norm") is norm
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0])),
        ffn.gate.register_forward_pre_hook(lambda _, args: seen.update(gate=args[0])),
    ]
    logits(model, tokens())
    for handle in handles:
        handle.remove()
    expected = seen["residual"] * norm_scale(norm)
    sizes = seen["gate"] / expected
    assert torch.allclose(sizes, sizes[..., :1].expand_as(sizes), rtol=1e-3), "one positive factor a token"
    assert bool((sizes > 0).all())


def test_an_architecture_without_that_norm_is_refused() -> None:
    model, predictors = make("olmo2")
    with pytest.raises(BadInput, match="olmo2 has no norm before its FFN"):
        PredictedMask(model, predictors, [0.5] * 3, "pre_norm")
    with PredictedMask(model, predictors, [0.5] * 3, "post_norm"):
        assert bool(torch.isfinite(logits(model, tokens())).all())


@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_x1_is_zero_exactly_where_the_predictor_says_so(model_type: str, source: Input) -> None:
    model, predictors = make(model_type)
    cutoffs, ids = [0.45, 0.5, 0.55], tokens()
    before = logits(model, ids)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    with PredictedMask(model, predictors, cutoffs, source):
        handles = []
        for f in find_ffns(model):
            keep = input_module(model, f, source)
            handles += [
                keep.register_forward_pre_hook(lambda _, a, i=f.layer: seen.update({("x", i): a[0]})),
                f.gate.register_forward_hook(lambda _, a, out, i=f.layer: seen.update({("gate", i): out})),
                f.up.register_forward_hook(lambda _, a, out, i=f.layer: seen.update({("up", i): out})),
                f.down.register_forward_pre_hook(lambda _, a, i=f.layer: seen.update({("x1", i): a[0]})),
            ]
        after = logits(model, ids)
        for handle in handles:
            handle.remove()
    assert not torch.equal(before, after)
    for i in range(3):
        with torch.no_grad():
            active = torch.sigmoid(predictors[i](seen["x", i])) >= cutoffs[i]
        x1 = torch.relu(seen["gate", i]) * seen["up", i]
        assert torch.equal(seen["x1", i], x1 * active)
        assert 0 < float(active.float().mean()) < 1
    assert torch.equal(logits(model, ids), before), "left as it was"


def test_a_meter_opened_inside_counts_the_masked_zeros() -> None:
    model, predictors = make()
    with PredictedMask(model, predictors, [1 - 1e-15] * 3, "post_norm"), SparsityMeter(model) as meter:
        logits(model, tokens())
    assert meter.mean() == 1.0


def test_masked_values_are_zero_even_where_x1_is_not_finite() -> None:
    model, predictors = make()
    with torch.no_grad():
        find_ffns(model)[0].up.weight.fill_(torch.inf)
    with PredictedMask(model, predictors, [1 - 1e-15] * 3, "post_norm"):
        assert bool(torch.isfinite(logits(model, tokens())).all())


def test_every_layer_needs_its_predictor() -> None:
    model, predictors = make()
    with pytest.raises(BadInput, match="2 predictors and 3 cutoffs for 3 layers"):
        PredictedMask(model, predictors[:2], [0.5] * 3, "post_norm")
    assert not any(f.down._forward_pre_hooks for f in find_ffns(model))


def test_logit() -> None:
    assert logit(0.5) == 0
    assert logit(0.0) == -float("inf")
    assert logit(1.0) == float("inf")
    assert logit(0.25) == -logit(0.75)
