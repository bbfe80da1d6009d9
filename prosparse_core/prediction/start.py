"""Where a predictor begins: the best low-rank copy of the gate itself, which needs no training to be useful.

sign(gate(x)) is what plain ReLU zeroes by. On the residual stream r before an RMSNorm of weight w, gate's output is a
positive multiple of A r with A = gate * diag(w); on the FFN's own input A = gate. A rank-k truncation of A's singular
value decomposition, written with ReLU between its halves, is ``[B, -B] relu([V; -V] r)`` = B V r: 2k hidden numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prosparse_core.predictor import LayerPredictor


@torch.no_grad()
def svd_predictor(
    gate: Tensor, hidden: int, *, channels: Tensor | None = None, generator: torch.Generator | None = None
) -> LayerPredictor:
    """The predictor whose scores are the best approximation of A of rank ``hidden // 2`` (at most d_model).

    With ``hidden >= 2 * d_model`` they are A x itself. Hidden numbers that are left over begin with random ``fc1`` rows
    and zeros in ``fc2``: they say nothing yet, but can learn to.

    Args:
        gate: [d_ff, d_model].
        channels: [d_model], what the norm before the FFN multiplies with, for a predictor that reads what it takes.
    """
    A = gate.double().cpu() * (1.0 if channels is None else channels.double().cpu())
    d_ff, d_model = A.shape
    rank = min(hidden // 2, d_model)
    # The right singular vectors are the eigenvectors of A'A, [d_model, d_model]: d_ff is the larger side.
    V = torch.linalg.eigh(A.T @ A).eigenvectors[:, d_model - rank :]
    B = A @ V
    predictor = LayerPredictor(d_model, d_ff, hidden, generator)
    predictor.fc2.weight.zero_()
    predictor.fc1.weight[:rank], predictor.fc1.weight[rank : 2 * rank] = V.T.float(), -V.T.float()
    predictor.fc2.weight[:, :rank], predictor.fc2.weight[:, rank : 2 * rank] = B.float(), -B.float()
    return predictor.eval()
