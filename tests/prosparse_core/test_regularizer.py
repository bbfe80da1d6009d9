"""The regularizer against plain autograd on a penalty that is part of the loss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import tokens
from regularized import (
    FACTOR,
    PARTS,
    gradients,
    lm_loss,
    padded_batch,
    reduction_of,
    regularized_passes,
    relu_model,
    step_in_the_graph,
)
from torch import Tensor, nn

from prosparse_core.families import find_ffns
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer

REDUCTIONS = [reduction_of(*names) for names in itertools.product(("mean", "sum"), repeat=3)]
EACH_REDUCTION = pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=lambda r: f"tokens={r.tokens},d_ff={r.d_ff},layers={r.layers}"
)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = gradients(theirs)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].abs().max()))


@EACH_REDUCTION
@pytest.mark.parametrize("parts", [((0, 6),), PARTS], ids=["one pass", "unequal passes"])
def test_values_and_gradients_equal_a_penalty_in_the_graph(reduction: L1Reduction, parts: Any) -> None:
    twin, model = relu_model(), relu_model()
    expected = step_in_the_graph(twin, FACTOR, reduction)
    with L1Regularizer(model, reduction) as regularizer:
        regularizer.l1_lambda = FACTOR
        loss = regularized_passes(model, regularizer, parts)
        assert (loss, *regularizer.collect()) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, twin)


def test_lambda_0_measures_and_changes_nothing() -> None:
    twin, model = relu_model(), relu_model()
    expected = step_in_the_graph(twin, 0.0, L1Reduction())
    with L1Regularizer(model, L1Reduction()) as regularizer:
        loss = regularized_passes(model, regularizer, ((0, 6),))
        assert (loss, *regularizer.collect()) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("factor", [0.0, FACTOR])
def test_gradient_checkpointing_counts_once_and_adds_once(factor: float, reentrant: bool) -> None:
    twin, model = relu_model(), relu_model()
    expected = step_in_the_graph(twin, factor, L1Reduction())
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    looks: list[int] = []
    find_ffns(model)[0].down.register_forward_pre_hook(lambda module, args: looks.append(1))
    with L1Regularizer(model, L1Reduction()) as regularizer:
        regularizer.l1_lambda = factor
        loss = regularized_passes(model, regularizer, PARTS)
        _, mask = padded_batch()
        assert len(looks) == 2 * len(PARTS), "every layer ran twice"
        assert regularizer._count == 3 * int(mask.sum())
        assert (loss, *regularizer.collect()) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, twin)


def test_an_x1_without_its_batch_dimension_takes_the_same_mask() -> None:
    x1 = torch.randn(6, 16, 53)
    _, mask = padded_batch()
    found = []
    for shape in ((6, 16, 53), (96, 53)):
        model = relu_model(num_hidden_layers=1)
        leaf = x1.reshape(shape).clone().requires_grad_()
        with L1Regularizer(model, L1Reduction()) as regularizer:
            regularizer.l1_lambda, regularizer.mask = FACTOR, mask.long()
            find_ffns(model)[0].down(leaf).sum().backward()
            assert leaf.grad is not None
            found.append((regularizer.collect(), leaf.grad.reshape(6, 16, 53)))
            regularizer.mask = mask[:, 1:]
            with pytest.raises(AssertionError, match="does not fit"):
                find_ffns(model)[0].down(leaf)
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    weight = find_ffns(relu_model(num_hidden_layers=1))[0].down.weight.detach().sum(0)
    wanted = weight + FACTOR / (int(mask.sum()) * 53) * x1.sign() * mask.unsqueeze(-1)
    torch.testing.assert_close(found[0][1], wanted)


def test_padding_may_hold_anything() -> None:
    model = relu_model(num_hidden_layers=1)
    _, mask = padded_batch()
    x1 = torch.randn(6, 16, 53)
    x1[~mask] = torch.inf
    with L1Regularizer(model, L1Reduction()) as regularizer, torch.no_grad():
        regularizer.mask = mask
        find_ffns(model)[0].down(x1)
        assert regularizer.collect()[1] == pytest.approx(float(x1[mask].abs().mean()), rel=1e-5)


def test_a_pass_of_padding_alone_adds_nothing() -> None:
    model = relu_model()
    x, mask = padded_batch()
    with L1Regularizer(model, L1Reduction()) as regularizer:
        regularizer.l1_lambda, regularizer.mask, regularizer.scale = FACTOR, torch.zeros_like(mask), 0.0
        lm_loss(model, x, mask).backward()
        with pytest.raises(AssertionError, match="no forward pass"):
            regularizer.collect()
    twin = relu_model()
    lm_loss(twin, x, mask).backward()
    assert_same_gradients(model, twin)


class Saved:
    """Counts the bytes autograd keeps for backward, each storage once."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.hooks.__exit__(*exc)

    def _pack(self, saved: Tensor) -> Tensor:
        self.kept.append(saved)
        return saved

    @property
    def bytes(self) -> int:
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self.kept)}
        return sum(storages.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_no_second_activation_is_kept(precision: torch.dtype, is_masked: bool) -> None:
    x, mask = padded_batch()
    kept, entries = [], []
    for factor in (0.0, FACTOR):
        model = relu_model()
        with L1Regularizer(model, L1Reduction()) as regularizer, Saved() as saved:
            regularizer.l1_lambda = factor
            regularizer.mask = mask if is_masked else None
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = model(input_ids=x, use_cache=False).logits.float().square().mean()
            kept.append(saved.bytes)
            entries.append(len(saved.kept))
        loss.backward()
    assert entries[1] == entries[0] + 3 * (1 + is_masked), "the regularizer does save x1"
    assert kept[1] == kept[0] + is_masked * mask.numel(), "and it is the one that down saves"


def test_the_coefficient_is_that_of_the_whole_step() -> None:
    model = relu_model()
    with L1Regularizer(model, L1Reduction()) as regularizer:
        regularizer.l1_lambda, regularizer.scale = 0.5, 0.25
        assert regularizer.element_coefficient(64) == pytest.approx(0.5 / (64 * 53))
        leaf = torch.ones(16, 53, requires_grad=True)
        down = find_ffns(model)[0].down
        down(leaf).sum().backward()
        assert leaf.grad is not None
        added = leaf.grad - down.weight.detach().sum(0)
        torch.testing.assert_close(added, torch.full_like(added, 0.5 / (64 * 53)), rtol=1e-3, atol=1e-7)
    for reduction, coefficient in (
        (reduction_of("sum"), 0.5 / 53),
        (reduction_of(d_ff="sum"), 0.5 / 64),
        (reduction_of(layers="mean"), 0.5 / (64 * 53 * 3)),
    ):
        regularizer = L1Regularizer(model, reduction)
        regularizer.l1_lambda = 0.5
        assert regularizer.element_coefficient(64) == pytest.approx(coefficient)
        regularizer.close()


def test_hooks_are_removed_and_an_empty_collect_is_a_mistake() -> None:
    model = relu_model()
    regularizer = L1Regularizer(model, L1Reduction())
    with pytest.raises(AssertionError, match="no forward pass"):
        regularizer.collect()
    regularizer.close()
    assert not any(f.down._forward_pre_hooks for f in find_ffns(model))
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    with pytest.raises(AssertionError, match="no forward pass"):
        regularizer.collect()
