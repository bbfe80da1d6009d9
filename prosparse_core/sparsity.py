"""Streaming statistics of x1, the input of down: exact zeros by token and by chunk of tokens, dead neurons, mean |x1|.

Sparsity is the paper's (section 3.1); chunk sparsity and activation shrinkage are BlockFFN's (arXiv 2507.08771).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prosparse_core.families import find_ffns

CHUNK = 8
"""Consecutive tokens whose zeros have to coincide before a kernel that computes them together can skip a neuron."""

BLOCK = 16 * CHUNK
"""Tokens counted at a time: bounds the memory, and what is read twice is still in the cache."""


def l1_and_live(x1: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum of |x1| in float32, number of non-zeros) of x1 [..., d_ff], as 0-dim tensors; -0.0 is a zero.

    ``mask`` [...] (bool, True: count this position) leaves the others out, whatever they hold.
    """
    magnitude = x1.detach().abs()
    bits = _bits(magnitude)
    if mask is not None:
        bits.mul_(mask.unsqueeze(-1).to(bits.dtype))
    return magnitude.sum(dtype=torch.float32), torch.count_nonzero(bits)


def _bits(magnitude: Tensor) -> Tensor:
    """|x1| as the integers its bits are: zero where it is zero, and unlike inf and nan zero when multiplied by zero.

    torch compares 16-bit floats one by one, integers many at a time.
    """
    return magnitude.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[magnitude.element_size()])


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
    mean_abs_live: float | None
    """Mean |x1| of the survivors, the non-zeros; None without any."""
    chunk_sparsity: float | None
    """Share of (chunk, neuron) pairs that are zero in all of a chunk's 8 tokens; None without a whole chunk.

    Chunks are cut from the first real token of a sequence on; what is left at its end belongs to none.
    """


class SparsityMeter:
    """Counts zeros of x1 in every forward pass of ``model`` while open; changes nothing in the model.

    ``mask`` [batch, seq] (True: count this position) may be set before a forward pass; None counts all. A family that
    hands down its tokens as [batch * seq, d_ff] has chunks only under a mask: without one nothing says where a sequence
    ends. Tokens decoded one by one have none.
    """

    def __init__(self, model: nn.Module) -> None:
        ffns = find_ffns(model)
        self._d_ff = [f.d_ff for f in ffns]
        self.mask: Tensor | None = None
        self.reset()
        self._handles = [
            f.down.register_forward_pre_hook(lambda module, args, layer=f.layer: self._on_down(layer, args[0]))
            for f in ffns
        ]

    def reset(self) -> None:
        num_layers = len(self._d_ff)
        self._tokens = [0] * num_layers
        self._chunks = [0] * num_layers
        # These become tensors where x1 is: nothing waits for a GPU before layers() is asked for.
        self._abs: list[Tensor | float] = [0.0] * num_layers
        self._live_in_chunks: list[Tensor | int] = [0] * num_layers
        self._alive: list[Tensor | int] = [0] * num_layers

    def _on_down(self, layer: int, x1: Tensor) -> None:
        x1_TF = x1.detach().flatten(0, -2)
        for start, end, is_sequence in self._runs(x1):
            for at in range(start, end, BLOCK):
                self._count(layer, x1_TF[at : min(at + BLOCK, end)], is_sequence)

    def _runs(self, x1: Tensor) -> Iterator[tuple[int, int, bool]]:
        """(first, one past the last, is it one sequence) of every run of real tokens in x1 flattened to [T, d_ff]."""
        if self.mask is None:
            length = x1.shape[-2] if x1.ndim > 2 else x1.shape[0]
            for start in range(0, x1.numel() // x1.shape[-1], length):
                yield start, start + length, x1.ndim > 2
            return
        assert self.mask.numel() * x1.shape[-1] == x1.numel(), f"mask {list(self.mask.shape)}, x1 {list(x1.shape)}"
        # A padding position before every sequence and after the last: runs begin and end where the value changes.
        padded = nn.functional.pad(self.mask.bool().cpu(), (1, 0)).flatten()
        edges = torch.diff(padded.byte(), append=padded.new_zeros(1).byte()).nonzero().flatten().tolist()
        width = self.mask.shape[-1] + 1
        for before, last in zip(edges[::2], edges[1::2], strict=True):
            start = before - before // width
            yield start, start + last - before, True

    def _count(self, layer: int, x1_TF: Tensor, is_sequence: bool) -> None:
        magnitude_TF = x1_TF.abs()
        live_TF = _bits(magnitude_TF) != 0
        num_whole = len(x1_TF) // CHUNK
        live_CF = live_TF[: num_whole * CHUNK].unflatten(0, (num_whole, CHUNK)).sum(1, dtype=torch.uint8)
        alive_F = live_CF.sum(0) + live_TF[num_whole * CHUNK :].sum(0)
        self._tokens[layer] += len(x1_TF)
        self._abs[layer] += magnitude_TF.sum(dtype=torch.float32).double()
        self._alive[layer] += alive_F
        if is_sequence:
            self._chunks[layer] += num_whole
            self._live_in_chunks[layer] += torch.count_nonzero(live_CF)

    def layers(self) -> list[LayerSparsity]:
        """Per layer, over everything counted since the last reset."""
        return [self._layer(layer) for layer in range(len(self._d_ff))]

    def _layer(self, layer: int) -> LayerSparsity:
        tokens, chunks, d_ff, alive = self._tokens[layer], self._chunks[layer], self._d_ff[layer], self._alive[layer]
        assert isinstance(alive, Tensor), "no forward pass was counted"
        num_live, total = int(alive.sum()), float(self._abs[layer])
        return LayerSparsity(
            layer=layer,
            num_tokens=tokens,
            sparsity=1.0 - num_live / (tokens * d_ff),
            dead_frac=float((alive == 0).double().mean()),
            mean_abs_x1=total / (tokens * d_ff),
            mean_abs_live=total / num_live if num_live else None,
            chunk_sparsity=1.0 - int(self._live_in_chunks[layer]) / (chunks * d_ff) if chunks else None,
        )

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
