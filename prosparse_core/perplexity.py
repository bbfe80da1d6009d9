"""Token perplexity of packed windows, with the sparsity of the same forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prosparse_core.document_masks import forward_arguments
from prosparse_core.loss import IGNORED, next_token_loss
from prosparse_core.precision import Precision, autocast
from prosparse_core.sparsity import SparsityMeter


@dataclass(frozen=True)
class Measured:
    """Negative log-likelihood (nats) summed over ``num_tokens`` predicted tokens, and the mean sparsity of x1."""

    nll: float
    num_tokens: int
    sparsity: float
    share: float = 1.0
    """Of its corpus in the training mixture: what it weighs beside other corpora."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.num_tokens, 700.0))


@torch.inference_mode()
def measure(
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    positions: Tensor | None = None,
    *,
    precision: Precision,
    batch_size: int = 4,
    on_batch: Callable[[int, int], None] | None = None,
) -> Measured:
    """Perplexity of ``labels`` given ``tokens`` (both [windows, seq_len], -100 where no loss; the model shifts).

    With ``positions``, of the same shape, documents of a window do not see each other.

    Positions of both prompt and answer count for the sparsity: every position that is forwarded does.
    """
    assert tokens.shape == labels.shape
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, count = 0.0, 0
    with SparsityMeter(model) as meter:
        for start in range(0, len(tokens), batch_size):
            x, y = tokens[start : start + batch_size].to(device), labels[start : start + batch_size].to(device)
            more = forward_arguments(model, None if positions is None else positions[start : start + batch_size])
            with autocast(precision, device.type):
                logits = model(input_ids=x, use_cache=False, **more).logits
            nll += float(next_token_loss(logits, y))
            count += int((y[:, 1:] != IGNORED).sum())
            if on_batch:
                on_batch(min(start + batch_size, len(tokens)), len(tokens))
        sparsity = meter.mean()
    model.train(was_training)
    assert count, "no token of these windows carries a loss"
    return Measured(nll, count, sparsity)
