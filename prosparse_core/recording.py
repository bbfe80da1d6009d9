"""What the FFNs of a model see and which neurons they activate: (x, x1 != 0) per token and layer, kept compactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.precision import Precision, autocast

if TYPE_CHECKING:
    from prosparse_core.mixing import Mixture


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [..., n] to uint8 [..., ceil(n / 8)] on the CPU; entry ``i`` is bit ``i % 8`` of byte ``i // 8``."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 [..., ceil(num_bits / 8)] to bool [..., num_bits]."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=num_bits, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


@dataclass(frozen=True)
class LayerRecording:
    """One layer over ``num_tokens`` token positions."""

    layer: int
    d_ff: int
    inputs: Tensor
    """[num_tokens, d_model]: x, the input of gate and up (behind the norm)."""
    packed_active: Tensor
    """uint8 [num_tokens, ceil(d_ff / 8)]: the bits of x1 != 0; see :meth:`active`."""

    @property
    def num_tokens(self) -> int:
        return len(self.inputs)

    def active(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Bool [tokens, d_ff]: x1 != 0, for some positions or for all."""
        return unpack_bits(self.packed_active[tokens], self.d_ff)

    @property
    def sparsity(self) -> float:
        """The share of exact zeros in x1."""
        ones = int(np.bitwise_count(self.packed_active.numpy()).sum())
        return 1.0 - ones / (self.num_tokens * self.d_ff)


@dataclass(frozen=True)
class Recording:
    """The recorded layers of one model, all over the same tokens."""

    layers: tuple[LayerRecording, ...]

    @property
    def num_tokens(self) -> int:
        return self.layers[0].num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(r.inputs.nbytes + r.packed_active.nbytes for r in self.layers)


def held_out_windows(mixture: Mixture, tokenizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Full windows of the evaluation documents as (corpus, int64 [1, seq_len]), the corpora taking turns.

    So any beginning of the stream has about as much of each corpus. A corpus shorter than ``seq_len`` is one window of
    its own length; else the incomplete end is left out. The stream ends when every corpus is used up.
    """
    from prosparse_core.packing import Encoder

    encoder = Encoder(tokenizer)
    windows: dict[str, Tensor] = {}
    for corpus in mixture.corpora:
        encoded = encoder.encode(mixture.held_out("evaluation", corpus))
        tokens = torch.from_numpy(np.concatenate([e.tokens for e in encoded])).long()
        length = min(mixture.seq_len, len(tokens))
        windows[corpus] = tokens[: len(tokens) // length * length].view(-1, length)
    for turn in range(max(len(rows) for rows in windows.values())):
        for corpus, rows in windows.items():
            if turn < len(rows):
                yield corpus, rows[turn : turn + 1]


@torch.inference_mode()
def record(
    model: nn.Module,
    batches_of_tokens: Iterable[Tensor],
    *,
    num_tokens: int,
    precision: Precision,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stride: int = 1,
) -> Recording:
    """Forward full windows until ``num_tokens`` positions are recorded, or the windows are used up.

    Args:
        batches_of_tokens: each [windows, seq_len]; every position counts, so none may be padding.
        num_tokens: the most positions to keep; what lies beyond is dropped. Memory is taken for all of them at once:
            ``d_model`` numbers of ``dtype`` and ``d_ff / 8`` bytes per layer and token.
        precision: of the forward passes; the mask is the one this precision gives.
        layers: which layers to record; None for all.
        dtype: what x is kept in.
        stride: keep every ``stride``-th position of each batch, so that few positions come from whole contexts.

    Raises:
        BadInput: a layer that the model does not have, or no tokens.
    """
    assert num_tokens > 0
    assert stride > 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with _Recorder(model, num_tokens, layers, dtype, stride) as recorder:
            for tokens in batches_of_tokens:
                with autocast(precision, device.type):
                    # The logits of one position: the language model's head is no part of what is recorded.
                    model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=1)
                if recorder.is_full():
                    break
            return recorder.recording()
    finally:
        model.train(was_training)


class _Recorder:
    """Hooks on gate (its input is x) and down (its input is x1) of the chosen layers; removed when closed."""

    def __init__(
        self, model: nn.Module, num_tokens: int, layers: Sequence[int] | None, dtype: torch.dtype, stride: int
    ) -> None:
        ffns = find_ffns(model)
        wanted = range(len(ffns)) if layers is None else sorted(set(layers))
        unknown = [i for i in wanted if not 0 <= i < len(ffns)]
        if unknown or not wanted:
            raise BadInput(f"layers {unknown}: the model has layers 0 to {len(ffns) - 1}")
        self._num_tokens, self._stride = num_tokens, stride
        self._ffns = [ffns[i] for i in wanted]
        self._x = {f.layer: torch.empty(num_tokens, f.gate.in_features, dtype=dtype) for f in self._ffns}
        self._bits = {
            f.layer: torch.empty(num_tokens, -(-f.down.in_features // 8), dtype=torch.uint8) for f in self._ffns
        }
        self._filled_x, self._filled_bits = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)

    def __enter__(self) -> _Recorder:
        self._handles = [
            handle
            for f in self._ffns
            for handle in (
                f.gate.register_forward_pre_hook(lambda _, args, layer=f.layer: self._on_gate(layer, args[0])),
                f.down.register_forward_pre_hook(lambda _, args, layer=f.layer: self._on_down(layer, args[0])),
            )
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_gate(self, layer: int, x: Tensor) -> None:
        start = self._filled_x[layer]
        x_TD = x.flatten(0, -2)[self._stride - 1 :: self._stride][: self._num_tokens - start]
        self._x[layer][start : start + len(x_TD)] = x_TD
        self._filled_x[layer] += len(x_TD)

    def _on_down(self, layer: int, x1: Tensor) -> None:
        start = self._filled_bits[layer]
        x1_TF = x1.flatten(0, -2)[self._stride - 1 :: self._stride][: self._num_tokens - start]
        self._bits[layer][start : start + len(x1_TF)] = pack_bits(x1_TF != 0)
        self._filled_bits[layer] += len(x1_TF)

    def is_full(self) -> bool:
        return all(n == self._num_tokens for n in self._filled_bits.values())

    def recording(self) -> Recording:
        found = set(self._filled_x.values()) | set(self._filled_bits.values())
        assert len(found) == 1, f"gate and down saw different numbers of tokens: {sorted(found)}"
        (count,) = found
        if count == 0:
            raise BadInput("no tokens to record activations on", hint="the corpora are shorter than one token window")
        return Recording(
            tuple(
                LayerRecording(f.layer, f.down.in_features, self._x[f.layer][:count], self._bits[f.layer][:count])
                for f in self._ffns
            )
        )
