"""Masks against x1 zeroed by hand, and the two inputs a predictor can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, tiny, tokens

from prosparse_core.errors import BadInput
from prosparse_core.families import family_of, find_ffns
from prosparse_core.family import FFN
from prosparse_core.prediction.input import Input, input_module, norm_before, norm_scale
from prosparse_core.prediction.mask import PredictedMask, logit
from prosparse_core.predictor import LayerPredictor
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import use_relu


def make(model_type: str = "llama") -> tuple[Any, list[LayerPredictor]]:
    model = tiny(model_type, initializer_range=0.3)
    use_relu(model)
    return model, [LayerPredictor(32, 53, 9, torch.Generator().manual_seed(i)) for i in range(3)]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def norms(model_type: str) -> bool:
    family = family_of({"model_type": model_type})
    assert family is not None
    return bool(family.norm)


@pytest.mark.parametrize("model_type", list(filter(norms, MODEL_TYPES)))
def test_the_norm_before_the_ffn_gives_what_the_ffn_takes(model_type: str) -> None:
    model, _ = make(model_type)
    seen: dict[str, torch.Tensor] = {}
    ffn = find_ffns(model)[1]
    norm = norm_before(model, ffn)
    assert input_module(model, ffn, "pre_norm") is norm
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in norm.parameters():
            weight.uniform_(-0.5, 0.5, generator=generator)
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0])),
        norm.register_forward_hook(lambda _, args, out: seen.update(normed=out)),
        ffn.first.register_forward_pre_hook(lambda _, args: seen.update(taken=args[0])),
    ]
    logits(model, tokens())
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["taken"], seen["normed"])
    residual = seen["residual"]
    if "LayerNorm" in type(norm).__name__:  # what it does besides multiplying is no factor
        residual = residual - residual.mean(-1, keepdim=True)
        seen["taken"] = seen["taken"] - (0 if getattr(norm, "bias", None) is None else norm.bias)
    sizes = seen["taken"] / (residual * norm_scale(norm, 32))
    assert torch.allclose(sizes, sizes[..., :1].expand_as(sizes), rtol=1e-3), "one positive factor a token"
    assert bool((sizes > 0).all())


def test_an_architecture_without_that_norm_is_refused() -> None:
    model, predictors = make("olmo2")
    with pytest.raises(BadInput, match="opt has no norm before its FFN"):
        norm_before(behind := tiny("opt", do_layer_norm_before=False), find_ffns(behind)[0])
    with pytest.raises(BadInput, match="olmo2 has no norm before its FFN"):
        PredictedMask(model, predictors, [0.5] * 3, "pre_norm")
    with PredictedMask(model, predictors, [0.5] * 3, "post_norm"):
        assert bool(torch.isfinite(logits(model, tokens())).all())


def up_of(ffn: FFN, keep: Callable[[torch.Tensor, int], None]) -> list[Any]:
    """Watches up where it is a projection of its own beside a gate."""
    if ffn.family.gate is None or ffn.family.up is None:
        return []
    up = ffn.module.get_submodule(ffn.family.up)
    return [up.register_forward_hook(lambda _, a, out: keep(out, ffn.layer))]


@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt2", "opt"])
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
                f.first.register_forward_hook(lambda _, a, out, i=f.layer: seen.update({("first", i): out})),
                *up_of(f, lambda out, i: seen.update({("up", i): out})),
                f.down.register_forward_pre_hook(lambda _, a, i=f.layer: seen.update({("x1", i): a[0]})),
            ]
        after = logits(model, ids)
        for handle in handles:
            handle.remove()
    assert not torch.equal(before, after)
    for i in range(3):
        with torch.no_grad():
            active = torch.sigmoid(predictors[i](seen["x", i])) >= cutoffs[i]
        gate = seen["first", i][..., :53]
        up = seen["up", i] if ("up", i) in seen else seen["first", i][..., 53:] if model_type == "phi3" else 1.0
        x1 = torch.relu(gate) * up
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
        find_ffns(model)[0].up_weight.fill_(torch.inf)
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
