"""Learning from the dense original: KL between its next-token distribution and the model's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || model), in nats, summed over the positions whose next token carries a loss.

    Args:
        logits, teacher_logits: [B, T, vocab]; the same vocabulary.
        labels: [B, T], -100 where there is no loss; position t predicts label t + 1, as in the next-token loss.
        temperature: both distributions are softened by it; the square keeps the gradient's size (Hinton et al. 2015).
    """
    wanted = labels[:, 1:] != -100
    student = (logits[:, :-1][wanted].float() / temperature).log_softmax(-1)
    with torch.no_grad():
        teacher = (teacher_logits[:, :-1][wanted].float() / temperature).log_softmax(-1)
    return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
