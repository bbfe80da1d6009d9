"""Streaming statistics of x1, the input of down: share of exact zeros, dead neurons, mean |x1| (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prosparse_core.families import find_ffns


def l1_and_live(x1: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of |x1| in float32, number of non-zeros) of a tensor of any shape, as 0-dim tensors; -0.0 is a zero."""
    magnitude = x1.abs()
    # torch compares 16-bit floats with zero one by one, integers many at a time; abs() has cleared the sign of -0.0.
    bits = magnitude.view(torch.int16) if magnitude.element_size() == 2 else magnitude
    return magnitude.sum(dtype=torch.float32), torch.count_nonzero(bits)


@dataclass(frozen=True)
class LayerSparsity:
    """Statistics of one layer over ``num_tokens`` token positions."""

    layer: int
    num_tokens: int
    sparsity: float
    """Share of exact zeros in x1."""
    dead_frac: float
    """Share of neurons that were zero at every position."""
    mean_abs_x1: float
    """Mean |x1| over tokens and neurons, zeros included."""


class SparsityMeter:
    """Counts zeros of x1 in every forward pass of ``model`` while open; changes nothing in the model.

    ``mask`` [batch, seq] (True: count this position) may be set before a forward pass; None counts all.
    """

    def __init__(self, model: nn.Module) -> None:
        ffns = find_ffns(model)
        self._d_ff = [f.down.in_features for f in ffns]
        self.mask: Tensor | None = None
        self.reset()
        self._handles = [
            f.down.register_forward_pre_hook(lambda module, args, layer=f.layer: self._on_down(layer, args[0]))
            for f in ffns
        ]

    def reset(self) -> None:
        self._tokens = [0] * len(self._d_ff)
        self._abs = [0.0] * len(self._d_ff)
        self._alive = [torch.zeros(n, dtype=torch.int64) for n in self._d_ff]

    def _on_down(self, layer: int, x1: Tensor) -> None:
        x1_TF = x1.detach().flatten(0, -2) if self.mask is None else x1.detach()[self.mask]
        self._tokens[layer] += x1_TF.shape[0]
        self._abs[layer] += float(x1_TF.abs().sum(dtype=torch.float32))
        self._alive[layer] += torch.count_nonzero(x1_TF, dim=0).cpu()

    def layers(self) -> list[LayerSparsity]:
        """Per layer, over everything counted since the last reset."""
        result = []
        for layer, (tokens, d_ff) in enumerate(zip(self._tokens, self._d_ff, strict=True)):
            assert tokens, "no forward pass was counted"
            alive = self._alive[layer]
            result.append(
                LayerSparsity(
                    layer=layer,
                    num_tokens=tokens,
                    sparsity=1.0 - int(alive.sum()) / (tokens * d_ff),
                    dead_frac=float((alive == 0).double().mean()),
                    mean_abs_x1=self._abs[layer] / (tokens * d_ff),
                )
            )
        return result

    def mean(self) -> float:
        """The paper's average sparsity: the mean over layers."""
        layers = self.layers()
        return sum(s.sparsity for s in layers) / len(layers)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> SparsityMeter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
