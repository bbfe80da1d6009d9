"""L1 on x1, the input of down (paper, eq. 2; see ``family`` for x1 without a gate), with explicit reductions.

The penalty never enters the loss graph: an autograd function passes x1 through, and in backward it adds the penalty's
own gradient, coefficient * sign(x1). It saves the very x1 that down saves for its weights, so that no second copy of
an activation is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prosparse_core.families import find_ffns
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.sparsity import l1_and_live

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
            sign.mul_(mask.unsqueeze(-1))
        return torch.add(grads[0], sign, alpha=ctx.coefficient, out=sign), None, None


class L1Regularizer:
    """Hooks the input of every down projection of ``model``; ``close()`` removes the hooks.

    A training step is any number of forward and backward passes, followed by one :meth:`collect`. Passes may hold
    different numbers of tokens (``scale``), padding (``mask``), and run in several processes (``num_processes``). Under
    gradient checkpointing the second forward pass of a layer adds the gradient but is not counted again.

    Args:
        model: any model of a known family; hook it before it is wrapped for data parallelism, or hand in what the
            wrapper wraps.
        reduction: how |x1| becomes one number; see :class:`prosparse_core.recipe_train.L1Reduction`.
        compiled: the layers are compiled. The hooks then stay outside: they count, and lambda changes at every step.
    """

    def __init__(self, model: nn.Module, reduction: L1Reduction, *, compiled: bool = False) -> None:
        ffns = find_ffns(model)
        self.num_layers = len(ffns)
        self._down = ffns[0].down
        self.d_ff = ffns[0].d_ff
        self.reduction = reduction
        self.l1_lambda = 0.0
        self.scale = 1.0
        """Share of the step's tokens that this forward pass holds, over all its micro-batches and all processes."""
        self.num_processes = 1
        """Processes whose gradients are averaged (DDP, FSDP): each then adds this many times its own share."""
        self.mask = None
        self._abs: list[Tensor] = []
        self._zeros: list[Tensor] = []
        self._count = 0
        on_down = torch.compiler.disable(self._on_down) if compiled else self._on_down
        self._handles = [f.down.register_forward_pre_hook(on_down) for f in ffns]

    @property
    def mask(self) -> Tensor | None:
        """[batch, seq], non-zero for real tokens; None: all are. Keep it until the pass's backward is over."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._mask = None if mask is None else mask.bool()
        self._num_real = 0 if self._mask is None else int(self._mask.sum())

    def element_coefficient(self, step_tokens: float) -> float:
        """lambda's weight on one |x1| element of one layer in a step of ``step_tokens`` tokens, in all processes."""
        per_token = 1.0 / step_tokens if self.reduction.tokens == "mean" else 1.0
        per_neuron = 1.0 / self.d_ff if self.reduction.d_ff == "mean" else 1.0
        per_layer = 1.0 / self.num_layers if self.reduction.layers == "mean" else 1.0
        return self.l1_lambda * per_token * per_neuron * per_layer

    def _on_down(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x1, mask = args[0], self._mask
        num_tokens = x1.numel() // x1.shape[-1]
        if mask is not None:
            assert mask.numel() == num_tokens, f"mask {list(mask.shape)} does not fit x1 {list(x1.shape)}"
            mask, num_tokens = mask.reshape(x1.shape[:-1]), self._num_real
        if not num_tokens:
            return None
        # Inside a backward pass this is gradient checkpointing's second look at an x1 that was counted before.
        if torch._C._current_graph_task_id() == -1:
            with torch.no_grad():
                absolute, live = l1_and_live(x1, mask)
            self._abs.append(absolute)
            self._zeros.append(num_tokens * self.d_ff - live)
            self._count += num_tokens
        if self.l1_lambda == 0 or not torch.is_grad_enabled() or not x1.requires_grad:
            return None
        coefficient = self.num_processes * self.element_coefficient(num_tokens / self.scale)
        return (_AddL1Gradient.apply(x1, coefficient, mask), *args[1:])

    def collect(self, group: ProcessGroup | None = None) -> tuple[float, float, float]:
        """(l1, mean_abs_x1, sparsity) over every real token seen since the last call; forgets them.

        ``l1`` is the reduced |x1| without lambda, ``mean_abs_x1`` the plain mean over tokens, d_ff and layers,
        ``sparsity`` the share of exact zeros.

        Args:
            group: sum over the processes of this group, all of which must call; every one gets the same numbers.
        """
        zero = torch.zeros((), device=next(self._down.parameters()).device)
        sums = torch.stack([torch.stack(part or [zero]).double().sum() for part in (self._abs, self._zeros)])
        sums = torch.cat([sums, sums.new_tensor([self._count])])
        self.forget()
        if group is not None:
            from torch import distributed

            distributed.all_reduce(sums, group=group)
        total, zeros, count = sums.tolist()
        assert count, "no forward pass since the last collect()"
        mean_abs = total / (count * self.d_ff)
        l1 = mean_abs * (count / self.num_layers if self.reduction.tokens == "sum" else 1)
        l1 *= self.d_ff if self.reduction.d_ff == "sum" else 1
        l1 *= self.num_layers if self.reduction.layers == "sum" else 1
        return l1, mean_abs, zeros / (count * self.d_ff)

    def forget(self) -> None:
        """Leave what was seen since the last :meth:`collect` out of the next one."""
        self._abs, self._zeros, self._count = [], [], 0

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> L1Regularizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
