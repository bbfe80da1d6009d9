"""Learning from the dense original: KL between its next-token distribution and the model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prosparse_core.loss import IGNORED, row_chunks


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, weight: float = 1.0
) -> Tensor:
    """weight * temperature^2 * KL(teacher || model), in nats (fp32), summed over the positions whose next token carries
    a loss.

    As the next-token loss it goes through the logits a few rows at a time, and once: the gradient is found on the way,
    so that the teacher's logits are free as soon as the loss is there.

    Args:
        logits, teacher_logits: [B, T, vocab], any float precision; the same vocabulary.
        labels: [B, T], ``IGNORED`` where there is no loss; position t predicts label t + 1, as in the next-token loss.
        temperature: both distributions are softened by it; the square keeps the gradient's size (Hinton et al. 2015).
        weight: the loss's share among others, and over the positions where they are averaged. Given here it is in the
            gradient before that is rounded to the logits' precision: what multiplies the loss later rounds it again.
    """
    carries_loss = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)
    flat, teacher = logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1)
    loss: Tensor = _Divergence.apply(flat, teacher, carries_loss.flatten(), temperature, weight)
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher_logits: Tensor, carries_loss: Tensor, temperature: float, weight: float
    ) -> Tensor:
        loss = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(logits):
            weights = weight * carries_loss[rows, None].float()
            log_q = logits[rows].float() / temperature
            log_q -= log_q.logsumexp(1, keepdim=True)
            log_p = teacher_logits[rows].float() / temperature
            log_p -= log_p.logsumexp(1, keepdim=True)
            p = log_p.exp()
            loss += (p * weights).mul_(log_p.sub_(log_q)).sum()
            if gradient is not None:
                # d KL / d logits = (q - p) / T
                gradient[rows] = log_q.exp_().sub_(p).mul_(weights * temperature)
        ctx.save_for_backward(gradient)
        return loss * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place, as it is the largest tensor of a step: a second backward is refused, as this one modifies it.
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None, None
