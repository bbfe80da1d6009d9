"""CETT against a brute-force twin, its inverse, and the layers and tokens that could break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, tokens
from torch import Tensor

from prosparse_core.cett import (
    NUM_CANDIDATES,
    LayerCurve,
    candidates_of,
    measure_cett,
    removed_shares,
    sample_positions,
    thresholds_at,
)
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.precision import Precision, autocast
from prosparse_core.substitute import use_thresholds


def relu_model(**changes: Any) -> Any:
    model = tiny(**changes)
    use_thresholds(model, [0.0])
    return model


def brute_force(model: Any, tokens: Tensor, layer: int, precision: Precision) -> Callable[[float], float]:
    """CETT at a threshold by the definition: zero what lies below it, multiply, divide the norms, take the mean."""
    ffn, seen = find_ffns(model)[layer], {}
    hooks = [
        ffn.activation.register_forward_pre_hook(lambda m, args: seen.update(gate=args[0])),
        ffn.down.register_forward_pre_hook(lambda m, args: seen.update(x1=args[0])),
    ]
    with torch.no_grad(), autocast(precision):
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    gate, x1 = seen["gate"].flatten(0, -2).double(), seen["x1"].flatten(0, -2).double()
    weight = ffn.down_weight.detach().double()
    norms = (x1 @ weight.T).norm(dim=1)
    return lambda t: float(((torch.where(torch.relu(gate) < t, x1, 0.0) @ weight.T).norm(dim=1) / norms).mean())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt2", "opt", "minicpm"])
def test_every_candidate_is_as_the_definition_says(model_type: str, precision: Precision) -> None:
    model, x = relu_model(model_type=model_type), tokens(5, 12)
    curves = measure_cett(
        model, [(x[:3], x[:3], None), (x[3:], x[3:], None)], precision=precision, num_tokens=60, batch_size=5
    )
    assert len(curves) == 3
    for layer, curve in enumerate(curves):
        cett_of = brute_force(model, x, layer, precision)
        assert curve.num_tokens == 60
        assert float(curve.thresholds[0]) == float(curve.cett[0]) == 0.0
        assert bool((curve.thresholds.diff() > 0).all())
        shares = torch.tensor([cett_of(float(t)) for t in curve.thresholds]).double()
        assert torch.allclose(curve.cett, shares.cummax(0).values, atol=1e-5)


def test_the_thresholds_of_a_cett_take_that_share_and_no_smaller_one_takes_more() -> None:
    model, x = relu_model(seed=3), tokens(4, 16)
    curves = measure_cett(model, [(x, x, None)], precision="fp32")
    found = {c: thresholds_at(curves, c) for c in (0.0, 0.1, 0.3, 0.6)}
    assert found[0.0] == [0.0, 0.0, 0.0]
    for cett, per_layer in list(found.items())[1:]:
        for layer, t in enumerate(per_layer):
            assert 0 < brute_force(model, x, layer, "fp32")(t) <= cett + 1e-6
            place = int((curves[layer].thresholds == t).nonzero())
            assert float(curves[layer].cett[place + 1]) > cett, "the next candidate takes too much"
    assert all(a < b < c for a, b, c in zip(found[0.1], found[0.3], found[0.6], strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans())
def test_shares_of_one_token(seed: int, d_ff: int, is_coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(d_ff, generator=generator) for _ in range(2))
    gate = (2 * gate).round() / 2 if is_coarse else gate  # many equal gates, some exactly 0
    x1, columns = torch.relu(gate) * up, torch.randn(d_ff, 7, generator=generator)
    thresholds = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, 9.0])
    found = removed_shares(gate, x1, columns, thresholds)
    if not bool(x1.any()):
        assert found is None
        return
    assert found is not None
    whole = (x1.double() @ columns.double()).norm()
    for t, share in zip(thresholds, found, strict=True):
        removed = torch.where(torch.relu(gate) < t, x1, 0.0).double() @ columns.double()
        assert float(share) == pytest.approx(float(removed.norm() / whole), rel=1e-4, abs=1e-5)
    assert float(found[0]) == 0
    assert float(found[-1]) == pytest.approx(1)


def test_a_layer_without_output_loses_nothing_and_a_dead_one_gets_no_threshold() -> None:
    model, x = relu_model(), tokens()
    ffns = find_ffns(model)
    with torch.no_grad():
        ffns[0].down_weight.zero_()
        ffns[1].act_weight.zero_()
    no_output, dead, whole = measure_cett(model, [(x, x, None)], precision="fp32")
    assert no_output.num_tokens == dead.num_tokens == 0
    assert not bool(no_output.cett.any())
    assert no_output.largest_threshold(0.1) == float(no_output.thresholds[-1]) > 0
    assert (dead.thresholds.tolist(), dead.cett.tolist()) == ([0.0], [0.0])
    assert dead.largest_threshold(0.9) == 0.0
    assert whole.num_tokens == x.numel()


def test_cett_that_dips_counts_by_its_maximum() -> None:
    shares = torch.tensor([0, 0.3, 0.2, 0.5], dtype=torch.float64)
    curve = LayerCurve(torch.arange(4, dtype=torch.float64), shares.cummax(0).values, 1)
    assert [curve.largest_threshold(c) for c in (0.25, 0.3, 0.49, 0.5, 1.0)] == [0.0, 2.0, 2.0, 3.0, 3.0]


def test_candidates_are_values_the_gate_took() -> None:
    gate = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    found = candidates_of(gate, most=100)
    assert 50 < len(found) <= 101
    assert bool((found.diff() > 0).all())
    assert set(found.tolist()) <= {0.0, *gate.tolist()}
    assert float(found[-1]) == float(gate.max())
    assert candidates_of(torch.tensor([-1.0, 0.0, 2.0, 2.0])).tolist() == [0.0, 2.0]
    assert candidates_of(torch.tensor([-1.0, 0.0])).tolist() == [0.0]


def test_positions_are_spread_over_corpora_and_end_with_the_labels() -> None:
    plain, chat = torch.arange(40).view(4, 10), torch.arange(100, 120).view(2, 10)
    labels = torch.full_like(chat, -100)
    labels[0, 3:6] = 1
    labels[1, 2] = 1
    found, mask, _ = sample_positions([(plain, plain, None), (chat, labels, None)], 1000)
    assert torch.equal(found, torch.cat([plain, chat]))
    assert mask.sum(1).tolist() == [10, 10, 10, 10, 6, 3], "prompts count, what follows the last label is filler"
    _, few, _ = sample_positions([(plain, plain, None), (chat, labels, None)], 7)
    assert few.sum() == 7
    assert bool((few <= mask).all())
    assert int(few.any(1).sum()) >= 4
    many = torch.zeros(500, 10, dtype=torch.long)
    found, mask, _ = sample_positions([(many, many, None)], 1000)
    assert found.shape == (64, 10)
    with pytest.raises(BadInput, match="not one whole window"):
        sample_positions([(plain[:0], plain[:0], None)], 5)


def test_the_model_is_left_as_it_was() -> None:
    model, x = relu_model().train(), tokens()
    done: list[tuple[int, int]] = []
    measure_cett(model, [(x, x, None)], precision="fp32", batch_size=1, on_batch=lambda i, n: done.append((i, n)))
    assert done == [(1, 2), (2, 2)]
    assert model.training
    assert not any(f.activation._forward_pre_hooks or f.down._forward_pre_hooks for f in find_ffns(model))


def test_batches_choose_candidates_but_not_what_they_cost() -> None:
    model, x = relu_model(), tokens(4, 8)
    every = measure_cett(
        model, [(x, x, None)], precision="fp32", batch_size=4
    )  # few enough: every live gate is a candidate
    some = measure_cett(model, [(x, x, None)], precision="fp32", batch_size=1)
    for whole, part in zip(every, some, strict=True):
        assert len(part.thresholds) < len(whole.thresholds) < NUM_CANDIDATES
        places = torch.searchsorted(whole.thresholds, part.thresholds)
        assert torch.allclose(whole.thresholds[places], part.thresholds, rtol=1e-5)
        assert bool((part.cett <= whole.cett[places] + 1e-5).all())
        assert torch.allclose(whole.cett[places], part.cett, atol=0.02)
