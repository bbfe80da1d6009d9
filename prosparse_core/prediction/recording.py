"""What the FFNs of a model see and which neurons they activate: (x, x1 != 0) per token and layer, kept compactly.

In memory, or in one file per layer and kind, which the operating system reads and forgets as it needs: training from
files keeps no more than a batch in memory, however long the recording is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prosparse_core.document_masks import Packed, forward_arguments, positions_of
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.forward import last_logits_only
from prosparse_core.precision import Precision, autocast
from prosparse_core.prediction.input import Input, input_module
from prosparse_core.store import write_json

if TYPE_CHECKING:
    from prosparse_core.mixing import Mixture

LabelRule = Literal["nonzero", "top_p"]
"""nonzero: a neuron is active iff |x1| > 0. top_p: of these, the share of d_ff with the largest |x1| of each token."""
WHOLE = "recording.json"
"""Written into a folder of recordings when every file of it is whole."""
BLOCK = 4096
"""Positions counted at a time."""


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
    """[num_tokens, d_model]: x, the input of the FFN (behind the norm), or the residual stream before the norm."""
    packed_active: Tensor
    """uint8 [num_tokens, ceil(d_ff / 8)]: the bits of x1 != 0; see :meth:`active`."""
    packed_top: Tensor | None = None
    """The same of the rule top_p; None where it was not recorded."""

    @property
    def num_tokens(self) -> int:
        return len(self.inputs)

    def active(self, tokens: Tensor | slice = slice(None), rule: LabelRule = "nonzero") -> Tensor:
        """Bool [tokens, d_ff]: which neurons count as active, for some positions or for all."""
        return unpack_bits(self._packed(rule)[tokens], self.d_ff)

    def inactive_share(self, rule: LabelRule = "nonzero") -> float:
        """The share of (token, neuron) pairs that the rule does not count as active."""
        ones = sum(int(np.bitwise_count(part.numpy()).sum()) for part in self._packed(rule).split(BLOCK))
        return 1.0 - ones / (self.num_tokens * self.d_ff)

    @property
    def sparsity(self) -> float:
        """The share of exact zeros in x1."""
        return self.inactive_share()

    def _packed(self, rule: LabelRule) -> Tensor:
        packed = self.packed_active if rule == "nonzero" else self.packed_top
        assert packed is not None, "top_p labels were not recorded"
        return packed


@dataclass(frozen=True)
class Recording:
    """The recorded layers of one model, all over the same tokens."""

    layers: tuple[LayerRecording, ...]

    @property
    def num_tokens(self) -> int:
        return self.layers[0].num_tokens

    @property
    def num_bytes(self) -> int:
        kept = [t for r in self.layers for t in (r.inputs, r.packed_active, r.packed_top) if t is not None]
        return sum(t.nbytes for t in kept)


def bytes_per_token(d_model: int, d_ff: int, num_layers: int) -> int:
    """What a recording with both kinds of labels takes on the disk for one position."""
    return num_layers * (2 * d_model + 2 * -(-d_ff // 8))


def calibration_windows(mixture: Mixture) -> Iterator[tuple[str, Packed]]:
    """The windows thresholds are chosen on, as (corpus, int64 [1, seq_len]), the corpora taking turns."""
    found = {corpus: mixture.calibration(corpus) for corpus in mixture.corpora}
    yield from _in_turns({corpus: Packed(batch.tokens, batch.positions) for corpus, batch in found.items()})


def _in_turns(windows: dict[str, Packed]) -> Iterator[tuple[str, Packed]]:
    for turn in range(max(len(rows.tokens) for rows in windows.values())):
        for corpus, rows in windows.items():
            if turn < len(rows.tokens):
                one = slice(turn, turn + 1)
                yield corpus, Packed(rows.tokens[one], None if rows.positions is None else rows.positions[one])


def held_out_windows(mixture: Mixture, tokenizer: Any) -> Iterator[tuple[str, Packed]]:
    """Full windows of the evaluation documents as (corpus, int64 [1, seq_len]), the corpora taking turns.

    So any beginning of the stream has about as much of each corpus. The first document follows the separator, as in
    training every one does. A corpus shorter than ``seq_len`` is one window of its own length; else the incomplete end
    is left out. The stream ends when every corpus is used up.
    """
    from prosparse_core.data.packing import Encoder

    encoder = Encoder(tokenizer)
    windows: dict[str, Packed] = {}
    for corpus in mixture.corpora:
        documents = mixture.held_out("evaluation", corpus)
        encoded = encoder.encode(documents)
        lead = [] if encoder.prefix else encoder.lead(is_chat=documents[0].chat is not None)
        parts = [np.array(lead, dtype=np.int32), *(e.tokens for e in encoded)]
        tokens = torch.from_numpy(np.concatenate(parts)).long()
        length = min(mixture.seq_len, len(tokens))
        whole = len(tokens) // length * length
        positions = None
        if not mixture.attend_across:
            begins = torch.zeros(len(tokens), dtype=torch.bool)
            places = torch.tensor([len(lead), *(len(e.tokens) for e in encoded[:-1])]).cumsum(0)
            begins[(places - encoder.num_leading(is_chat=documents[0].chat is not None)).clamp(min=0)] = True
            positions = positions_of(begins[:whole].view(-1, length))
        windows[corpus] = Packed(tokens[:whole].view(-1, length), positions)
    yield from _in_turns(windows)


@torch.inference_mode()
def record(
    model: nn.Module,
    batches_of_tokens: Iterable[Tensor | Packed],
    *,
    num_tokens: int,
    precision: Precision,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stride: int = 1,
    source: Input = "post_norm",
    top_share: float | None = None,
    folder: Path | None = None,
) -> Recording:
    """Forward full windows until ``num_tokens`` positions are recorded, or the windows are used up.

    Args:
        batches_of_tokens: each [windows, seq_len], where documents are kept apart with their positions; every position
            counts, so none may be padding.
        num_tokens: the most positions to keep; what lies beyond is dropped. Memory (or disk) is taken for all of them
            at once: ``d_model`` numbers of ``dtype`` and ``d_ff / 8`` bytes per layer and token.
        precision: of the forward passes; the mask is the one this precision gives.
        layers: which layers to record; None for all.
        dtype: what x is kept in.
        stride: keep every ``stride``-th position of each batch, so that few positions come from whole contexts.
        source: what x is: the FFN's input, or the residual stream before its norm.
        top_share: also keep top_p labels, of this share of d_ff (at least one neuron).
        folder: keep everything in files there instead of in memory; a whole recording found there is returned as it
            is, a partial one is made anew.

    Raises:
        BadInput: a layer that the model does not have, or no tokens.
        OSError: the disk is full; said before anything is written to a place that it does not have.
    """
    if folder is not None and (folder / WHOLE).is_file():
        return open_recording(folder)
    assert num_tokens > 0
    assert stride > 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with _Recorder(model, num_tokens, layers, dtype, stride, source, top_share, folder) as recorder:
            for tokens, positions in map(Packed.of, batches_of_tokens):
                more = forward_arguments(model, positions)
                with autocast(precision, device.type):
                    # The logits of one position: the language model's head is no part of what is recorded.
                    model(input_ids=tokens.to(device), use_cache=False, **more, **last_logits_only(model))
                if recorder.is_full():
                    break
            return recorder.recording()
    finally:
        model.train(was_training)


def open_recording(folder: Path) -> Recording:
    """A whole recording that :func:`record` left in a folder; read when it is asked for."""
    found = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
    dtype, count = getattr(torch, found["dtype"]), found["num_tokens"]
    layers = []
    for layer in found["layers"]:
        bits = -(-layer["d_ff"] // 8)
        kinds = {
            name: _map(folder, layer["layer"], name, (count, width), kind)
            for name, width, kind in (
                ("inputs", layer["d_model"], dtype),
                ("active", bits, torch.uint8),
                *((("top", bits, torch.uint8),) if found["has_top"] else ()),
            )
        }
        one = LayerRecording(layer["layer"], layer["d_ff"], kinds["inputs"], kinds["active"], kinds.get("top"))
        layers.append(one)
    return Recording(tuple(layers))


def _map(folder: Path, layer: int, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file, which has room on the disk before anything is written to it."""
    path, size = folder / f"layer_{layer}.{name}", math.prod(shape)
    with open(path, "ab") as handle:
        os.posix_fallocate(handle.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


class _Recorder:
    """Hooks on what the predictors read and on down (its input is x1) of the chosen layers; removed when closed."""

    def __init__(
        self,
        model: nn.Module,
        num_tokens: int,
        layers: Sequence[int] | None,
        dtype: torch.dtype,
        stride: int,
        source: Input,
        top_share: float | None,
        folder: Path | None,
    ) -> None:
        ffns = find_ffns(model)
        wanted = range(len(ffns)) if layers is None else sorted(set(layers))
        unknown = [i for i in wanted if not 0 <= i < len(ffns)]
        if unknown or not wanted:
            raise BadInput(f"layers {unknown}: the model has layers 0 to {len(ffns) - 1}")
        self._num_tokens, self._stride, self._folder, self._dtype = num_tokens, stride, folder, dtype
        self._ffns = [ffns[i] for i in wanted]
        self._modules = [input_module(model, f, source) for f in self._ffns]
        self._top = {f.layer: max(1, int(top_share * f.d_ff)) for f in self._ffns} if top_share else {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._x = {f.layer: self._room(f.layer, "inputs", f.d_model, dtype) for f in self._ffns}
        self._bits = {f.layer: self._room(f.layer, "active", -(-f.d_ff // 8)) for f in self._ffns}
        self._top_bits = {f.layer: self._room(f.layer, "top", -(-f.d_ff // 8)) for f in self._ffns if self._top}
        self._filled_x, self._filled_bits = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)

    def _room(self, layer: int, name: str, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        if self._folder is None:
            return torch.empty(self._num_tokens, width, dtype=dtype)
        return _map(self._folder, layer, name, (self._num_tokens, width), dtype)

    def __enter__(self) -> _Recorder:
        self._handles = [
            handle
            for f, module in zip(self._ffns, self._modules, strict=True)
            for handle in (
                module.register_forward_pre_hook(lambda _, args, layer=f.layer: self._on_input(layer, args[0])),
                f.down.register_forward_pre_hook(lambda _, args, layer=f.layer: self._on_down(layer, args[0])),
            )
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_input(self, layer: int, x: Tensor) -> None:
        start = self._filled_x[layer]
        x_TD = x.flatten(0, -2)[self._stride - 1 :: self._stride][: self._num_tokens - start]
        self._x[layer][start : start + len(x_TD)] = x_TD
        self._filled_x[layer] += len(x_TD)

    def _on_down(self, layer: int, x1: Tensor) -> None:
        start = self._filled_bits[layer]
        x1_TF = x1.flatten(0, -2)[self._stride - 1 :: self._stride][: self._num_tokens - start]
        active_TF = x1_TF != 0
        self._bits[layer][start : start + len(x1_TF)] = pack_bits(active_TF)
        if self._top:
            largest_TK = x1_TF.abs().topk(self._top[layer], dim=-1).indices
            top_TF = torch.zeros_like(active_TF).scatter_(-1, largest_TK, True) & active_TF
            self._top_bits[layer][start : start + len(x1_TF)] = pack_bits(top_TF)
        self._filled_bits[layer] += len(x1_TF)

    def is_full(self) -> bool:
        return all(n == self._num_tokens for n in self._filled_bits.values())

    def recording(self) -> Recording:
        found = set(self._filled_x.values()) | set(self._filled_bits.values())
        assert len(found) == 1, f"gate and down saw different numbers of tokens: {sorted(found)}"
        (count,) = found
        if count == 0:
            raise BadInput("no tokens to record activations on", hint="the corpora are shorter than one token window")
        if self._folder is not None:
            layers = [{"layer": f.layer, "d_model": f.d_model, "d_ff": f.d_ff} for f in self._ffns]
            described = {"num_tokens": count, "dtype": str(self._dtype).removeprefix("torch.")}
            write_json(self._folder / WHOLE, {**described, "has_top": bool(self._top), "layers": layers})
        return Recording(
            tuple(
                LayerRecording(
                    f.layer,
                    f.d_ff,
                    self._x[f.layer][:count],
                    self._bits[f.layer][:count],
                    self._top_bits[f.layer][:count] if self._top else None,
                )
                for f in self._ffns
            )
        )
