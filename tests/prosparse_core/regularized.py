"""A regularized step, and the same with the penalty in the loss graph: what the regularizer's tests share.

Run as a program it is one of the processes of a data-parallel step: see test_regularizer_parallel.py.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from models import tiny, tokens
from torch import Tensor, nn

from prosparse_core.families import find_ffns
from prosparse_core.loss import next_token_loss
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.substitute import use_relu

FACTOR = 3.0
PARTS = ((0, 1), (1, 4), (4, 5), (5, 6))
"""Sequences of each forward pass: unequal; the first two are those of process 0."""


def relu_model(**changes: Any) -> Any:
    model = tiny(**changes)
    use_relu(model)
    return model


def reduction_of(tokens: str = "mean", d_ff: str = "mean", layers: str = "sum") -> L1Reduction:
    """Unvalidated: the regularizer knows every combination, whichever of them recipes offer."""
    return L1Reduction.model_construct(tokens=tokens, d_ff=d_ff, layers=layers)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Tokens [6, 16] and the mask of those that are real; the fourth sequence has one, the others have more."""
    mask = torch.arange(16)[None, :] < torch.tensor([16, 7, 16, 1, 12, 3])[:, None]
    return tokens(batch=6), mask


def lm_loss(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Summed over the real tokens after the first."""
    logits = model(input_ids=x, attention_mask=mask.long(), use_cache=False).logits
    return next_token_loss(logits, x.masked_fill(~mask, -100))


def step_in_the_graph(model: nn.Module, factor: float, reduction: L1Reduction) -> tuple[float, float, float, float]:
    """(loss, l1, mean |x1|, sparsity) by plain autograd in one pass; leaves the gradients on the model."""
    x, mask = padded_batch()
    kept: list[Tensor] = []
    handles = [f.down.register_forward_pre_hook(lambda m, a: kept.append(a[0])) for f in find_ffns(model)]
    loss = lm_loss(model, x, mask) / mask[:, 1:].sum()
    real = torch.stack(kept)[:, mask]
    per_token = real.abs().sum(-1) if reduction.d_ff == "sum" else real.abs().mean(-1)
    per_layer = per_token.sum(-1) if reduction.tokens == "sum" else per_token.mean(-1)
    l1 = per_layer.sum() if reduction.layers == "sum" else per_layer.mean()
    (loss + factor * l1).backward()
    for handle in handles:
        handle.remove()
    return (
        float(loss.detach()),
        float(l1.detach()),
        float(real.detach().abs().mean()),
        float((real == 0).float().mean()),
    )


def regularized_passes(
    model: nn.Module, regularizer: L1Regularizer, parts: tuple[tuple[int, int], ...], num_processes: int = 1
) -> float:
    """The loss of some parts of the step, each with its backward pass; gradients are averaged over processes."""
    x, mask = padded_batch()
    total = 0.0
    regularizer.num_processes = num_processes
    for first, end in parts:
        regularizer.mask = mask[first:end]
        regularizer.scale = int(mask[first:end].sum()) / int(mask.sum())
        loss = lm_loss(model, x[first:end], mask[first:end]) / mask[:, 1:].sum()
        (num_processes * loss).backward()
        total += float(loss.detach())
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, on every process."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def parallel(mode: str, rank: int, reduction: L1Reduction) -> dict[str, Any]:
    """One process's half of the step under ``ddp`` or ``fsdp``, with gradient checkpointing where ``mode`` says so."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = relu_model()
    if mode.endswith("checkpointing"):
        model.train()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with L1Regularizer(model, reduction) as regularizer:
        regularizer.l1_lambda = FACTOR
        if mode.startswith("ddp"):
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            for module in (*model.model.layers, model):
                fully_shard(module)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
            wrapped = model
        loss = torch.tensor(regularized_passes(wrapped, regularizer, PARTS[2 * rank : 2 * rank + 2], 2))
        distributed.all_reduce(loss)
        numbers = [float(loss), *regularizer.collect(distributed.group.WORLD)]
    return {"numbers": numbers, "gradients": gradients(wrapped)}


def main(rank: int, folder: Path, modes: list[str]) -> None:
    from torch import distributed

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for mode in modes:
        torch.save(parallel(mode, rank, L1Reduction(d_ff="sum")), folder / f"{mode}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
