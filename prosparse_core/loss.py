"""Next-token cross entropy, a few rows of the logits at a time.

Logits are the largest tensor of a step: [1024, 49152] is 200 MB in fp32, and the textbook way makes five such copies
(shifted, widened, log-softmax, and two of the gradient). Here the logits are read where they lie, in their own
precision, and the gradient is their only companion; sums are fp32 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""A label that carries no loss."""
_CHUNK_BYTES = 4 << 20
"""fp32 bytes of logits at a time: they stay in a cache of the processor."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats (fp32), summed over the positions whose next token carries a loss.

    Args:
        logits: [B, T, vocab], any float precision; the gradient has the same.
        labels: [B, T], ``IGNORED`` where there is no loss; position t predicts label t + 1.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return loss


def log_likelihoods(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of each target, logsumexp of its row), both fp32 [N], of logits [N, vocab]; no gradient.

    Rows whose target is ``IGNORED`` have that of token 0.
    """
    log_p, norm = (torch.empty(len(targets), device=logits.device) for _ in range(2))
    for rows in row_chunks(logits):
        wide = logits[rows].float()
        norm[rows] = wide.logsumexp(1)
        log_p[rows] = wide.gather(1, targets[rows].clamp(min=0)[:, None]).squeeze(1) - norm[rows]
    return log_p, norm


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Rows of ``logits`` [N, vocab] that are small enough together, in order."""
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_p, norm = log_likelihoods(logits, targets)
        ctx.save_for_backward(logits, targets, norm)
        return -log_p.masked_fill(targets == IGNORED, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, norm = ctx.saved_tensors
        weights = torch.where(targets == IGNORED, 0.0, grads[0].float())[:, None]
        gradient = torch.empty_like(logits)
        for rows in row_chunks(logits):
            p = (logits[rows] - norm[rows, None]).exp_()  # fp32 softmax, less 1 at the target
            p.scatter_add_(1, targets[rows].clamp(min=0)[:, None], torch.full_like(norm[rows, None], -1.0))
            gradient[rows] = p.mul_(weights[rows])
        return gradient, None
