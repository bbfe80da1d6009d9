"""The chunked cross entropy against torch's own, value and gradient, and what it must not allocate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prosparse_core import loss


def twin(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def case(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (8 * torch.randn(3, 11, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (3, 11), generator=generator)
    labels[0, :7] = -100
    labels[2] = -100
    return logits, labels


@pytest.mark.parametrize("chunk_bytes", [4, 4 * 131 * 5, 4 << 20], ids=["a row", "ragged", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_bytes: int
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", chunk_bytes)
    logits, labels = case(131, dtype)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found, expected = loss.next_token_loss(ours, labels), twin(theirs, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (0.37 * found).backward()
    (0.37 * expected).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-7)
    assert not ours.grad[0, :6].any(), "no gradient where there is no loss"
    assert not ours.grad[:, -1].any(), "the last position predicts nothing"
    assert torch.equal(ours, logits), "the logits are others' as well"


def test_gradient_against_finite_differences() -> None:
    logits, labels = case(7, torch.float32)
    ours = logits.clone().requires_grad_()
    loss.next_token_loss(ours, labels).backward()
    assert ours.grad is not None
    for place in [(0, 6, 3), (0, 7, 0), (1, 0, 6), (1, 9, 2), (2, 4, 1)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-2
        difference = twin(logits + step, labels) - twin(logits - step, labels)
        assert float(ours.grad[place]) == pytest.approx(float(difference) / 2e-2, abs=2e-3)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([[[0.0, 1e4], [1e4, -1e4]]], requires_grad=True)
    found = loss.next_token_loss(logits, torch.tensor([[0, 0]]))
    found.backward()
    assert found.detach() == 1e4
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == [-1.0, 1.0]


def test_nothing_carries_a_loss() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    found = loss.next_token_loss(logits, torch.full((1, 4), -100))
    found.backward()
    assert found.detach() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_log_likelihoods_are_log_softmax_at_the_targets() -> None:
    logits, labels = case(131, torch.float32)
    rows, targets = logits.flatten(0, 1), labels.flatten().clamp(min=0)
    log_p, norm = loss.log_likelihoods(rows, targets)
    torch.testing.assert_close(log_p, rows.log_softmax(1).gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(norm, rows.logsumexp(1))
