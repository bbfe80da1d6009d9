"""L1 on x1 = act(gate(x)) * up(x), the input of down (paper, eq. 2), with explicit reductions.

The penalty never enters the loss graph: an autograd function passes x1 through, accumulates |x1| and adds the
penalty's own gradient, coefficient * sign(x1), in backward. No second copy of an activation is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core.families import find_ffns
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.sparsity import l1_and_live


class _AddL1Gradient(torch.autograd.Function):
    """Identity on x1 [..., d_ff]; backward adds ``coefficient * sign(x1)`` where ``mask`` [...] holds."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, coefficient: float, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(x1, mask)
        ctx.coefficient = coefficient
        return x1.view_as(x1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x1, mask = ctx.saved_tensors
        sign = torch.sign(x1)
        if mask is not None:
            sign = sign * mask.unsqueeze(-1)
        return torch.add(grads[0], sign, alpha=ctx.coefficient), None, None


class L1Regularizer:
    """Hooks the input of every down projection of ``model``; ``close()`` removes the hooks.

    After a forward pass ``l1`` is the reduced |x1| (without lambda), ``mean_abs_x1`` the plain mean over tokens, d_ff
    and layers, and ``sparsity`` the share of exact zeros, all over the tokens that ``mask`` keeps.

    Args:
        model: any model of a known family.
        reduction: how |x1| becomes one number; see :class:`prosparse_core.recipe.L1Reduction`.
    """

    def __init__(self, model: nn.Module, reduction: L1Reduction) -> None:
        ffns = find_ffns(model)
        self.num_layers = len(ffns)
        self.d_ff = ffns[0].down.in_features
        self.reduction = reduction
        self.l1_lambda = 0.0
        self.scale = 1.0
        """Share of the step's tokens in this forward pass (gradient accumulation)."""
        self.mask: Tensor | None = None
        """[batch, seq] bool, True for real tokens; None: all are."""
        self._abs: list[Tensor] = []
        self._zeros: list[Tensor] = []
        self._count = 0
        self._handles = [f.down.register_forward_pre_hook(self._on_down) for f in ffns]

    def element_coefficient(self, num_tokens: int) -> float:
        """lambda's weight on one |x1| element of one layer, for ``num_tokens`` tokens in the forward pass."""
        per_token = 1.0 / num_tokens
        per_neuron = 1.0 / self.d_ff if self.reduction.d_ff == "mean" else 1.0
        per_layer = 1.0 / self.num_layers if self.reduction.layers == "mean" else 1.0
        return self.l1_lambda * self.scale * per_token * per_neuron * per_layer

    def _on_down(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x1 = args[0]
        mask = self.mask
        with torch.no_grad():
            kept = x1.detach() if mask is None else x1.detach()[mask]
            num_tokens = kept.numel() // kept.shape[-1]
            absolute, live = l1_and_live(kept)
            self._abs.append(absolute)
            self._zeros.append(kept.numel() - live)
        self._count += num_tokens
        if self.l1_lambda == 0 or not torch.is_grad_enabled() or not x1.requires_grad:
            return None
        return (_AddL1Gradient.apply(x1, self.element_coefficient(num_tokens), mask), *args[1:])

    def collect(self) -> tuple[float, float, float]:
        """(l1, mean_abs_x1, sparsity) over everything seen since the last call; forgets it."""
        assert self._count, "no forward pass since the last collect()"
        elements = self._count * self.d_ff
        total = float(torch.stack(self._abs).double().sum())
        sparsity = float(torch.stack(self._zeros).sum()) / elements
        mean_abs = total / elements
        l1 = mean_abs * (self.d_ff if self.reduction.d_ff == "sum" else 1)
        l1 *= self.num_layers if self.reduction.layers == "sum" else 1
        self._abs, self._zeros, self._count = [], [], 0
        return l1, mean_abs, sparsity

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> L1Regularizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
