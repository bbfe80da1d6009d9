"""The regularizer against plain autograd on a penalty that is part of the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import tiny, tokens

from prosparse_core.families import find_ffns
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.substitute import use_relu
from prosparse_core.training import next_token_loss

REDUCTIONS = [L1Reduction(d_ff=d, layers=n) for d, n in itertools.product(("mean", "sum"), ("mean", "sum"))]


def brute_force(model: torch.nn.Module, x: torch.Tensor, factor: float, reduction: L1Reduction) -> tuple[float, float]:
    """(l1, sparsity) with the penalty in the loss graph; leaves the gradients on the model."""
    kept: list[torch.Tensor] = []
    handles = [f.down.register_forward_pre_hook(lambda m, a: kept.append(a[0])) for f in find_ffns(model)]
    loss = next_token_loss(model(input_ids=x, use_cache=False).logits, x) / (x.shape[0] * (x.shape[1] - 1))
    per_layer = [(t.abs().sum(-1) if reduction.d_ff == "sum" else t.abs().mean(-1)).mean() for t in kept]
    l1 = sum(per_layer) / (len(per_layer) if reduction.layers == "mean" else 1)
    (loss + factor * l1).backward()
    for handle in handles:
        handle.remove()
    zeros = sum(int((t == 0).sum()) for t in kept) / sum(t.numel() for t in kept)
    return float(l1.detach()), zeros


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: f"d_ff={r.d_ff},layers={r.layers}")
@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_gradients_and_values_equal_a_penalty_in_the_graph(reduction: L1Reduction, factor: float) -> None:
    x = tokens(batch=4)
    twin, model = tiny(), tiny()
    use_relu(twin)
    use_relu(model)
    l1, zeros = brute_force(twin, x, factor, reduction)
    with L1Regularizer(model, reduction) as regularizer:
        regularizer.l1_lambda = factor
        loss = next_token_loss(model(input_ids=x, use_cache=False).logits, x) / (x.shape[0] * (x.shape[1] - 1))
        loss.backward()
        found = regularizer.collect()
    assert found[0] == pytest.approx(l1, rel=1e-5)
    assert found[2] == pytest.approx(zeros, abs=1e-12)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


def test_gradient_accumulation_equals_one_pass() -> None:
    x = tokens(batch=4)
    whole, parts = tiny(), tiny()
    grads = []
    for model, size in ((whole, 4), (parts, 1)):
        use_relu(model)
        with L1Regularizer(model, L1Reduction()) as regularizer:
            regularizer.l1_lambda = 2.0
            for start in range(0, 4, size):
                regularizer.scale = size / 4
                micro = x[start : start + size]
                (next_token_loss(model(input_ids=micro, use_cache=False).logits, micro) / 60).backward()
            grads.append((regularizer.collect(), [p.grad for p in model.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_mask_leaves_padding_out() -> None:
    model = tiny()
    use_relu(model)
    x, mask = tokens(batch=2), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    seen: list[torch.Tensor] = []
    handle = find_ffns(model)[0].down.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with L1Regularizer(model, L1Reduction()) as regularizer, torch.no_grad():
        regularizer.mask = mask
        model(input_ids=x, attention_mask=mask.long(), use_cache=False)
        per_layer = regularizer._abs[0]
        _, _, sparsity = regularizer.collect()
    handle.remove()
    assert float(per_layer) == pytest.approx(float(seen[0][mask].abs().sum()), rel=1e-5)
    assert 0 < sparsity < 1


def test_hooks_are_removed_and_an_empty_collect_is_a_mistake() -> None:
    model = tiny()
    regularizer = L1Regularizer(model, L1Reduction())
    with pytest.raises(AssertionError, match="no forward pass"):
        regularizer.collect()
    regularizer.close()
    assert not any(f.down._forward_pre_hooks for f in find_ffns(model))
