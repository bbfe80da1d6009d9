"""Greedy decoding with a key-value cache, timed token by token, and FFN modules that can be exchanged and put back."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prosparse_core.activations import FATReLU, ReLU
from prosparse_core.errors import BadInput
from prosparse_core.families import FFN, find_ffns
from prosparse_core.forward import last_logits_only

Timer = Literal["process_cpu", "wall"]
CLOCKS: dict[str, Callable[[], float]] = {"process_cpu": time.process_time, "wall": time.perf_counter}


class GreedyDecoder:
    """One sequence, batch 1. The prompt [1, n] is forwarded at once; its token, and one per step, are in ``tokens``.

    ``logits`` [vocab] are those of the newest token. An end-of-sequence token does not end anything.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, timer: Timer) -> None:
        assert prompt.ndim == 2
        assert prompt.shape[0] == 1
        self._model, self._clock, self._cache = model, CLOCKS[timer], None
        self._last = last_logits_only(model)
        self.tokens: list[int] = []
        self._length = 0
        self._forward(prompt)

    def fork(self) -> GreedyDecoder:
        """Another decoder at the same place, with a cache of its own: the prompt is not read again."""
        other = copy.copy(self)
        other._cache, other.tokens = copy.deepcopy(self._cache), list(self.tokens)
        return other

    def keys_and_values(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Of every position so far, one ``[kv_heads, n, head_dim]`` a layer; None where the cache lacks some."""
        layers: list[Any] = list(getattr(self._cache, "layers", []))
        keys, values = ([getattr(layer, name, None) for layer in layers] for name in ("keys", "values"))
        found = [part[0] for part in (*keys, *values) if part is not None and part.shape[-2] == self._length]
        whole = len(layers) > 0 and len(found) == 2 * len(layers)
        return (found[: len(layers)], found[len(layers) :]) if whole else None

    def step(self, token: int | None = None) -> float:
        """Decode the next token; the seconds its forward pass and the choice took.

        Args:
            token: goes in instead of the newest one.
        """
        last = torch.tensor([[self.tokens[-1] if token is None else token]], device=self.logits.device)
        began = self._clock()
        self._forward(last)
        return self._clock() - began

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> None:
        out = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._last)
        self._cache = out.past_key_values
        self._length += tokens.shape[1]
        self.logits: Tensor = out.logits[0, -1]
        self.tokens.append(int(self.logits.argmax()))


def ffn_thresholds(model: nn.Module) -> list[float]:
    """The FATReLU threshold each layer runs with; 0 is ReLU.

    Raises:
        BadInput: an activation whose zeros no threshold describes, no gate, or a projection with a bias: such an FFN
            is not one that the sparse kernels compute.
    """
    found = []
    for ffn in find_ffns(model):
        if obstacle := why_not_sparse(ffn):
            raise BadInput(f"layer {ffn.layer}: {obstacle}")
        activation = ffn.activation
        if isinstance(activation, FATReLU):
            found.append(float(activation.threshold))
        elif isinstance(activation, ReLU | nn.ReLU):
            found.append(0.0)
        else:
            raise BadInput(
                f"layer {ffn.layer}: the activation is {activation}, not ReLU or FATReLU: no exact zeros to skip",
                hint="measure a variant with a ReLU activation",
            )
    return found


def why_not_sparse(ffn: FFN) -> str | None:
    """What keeps an FFN, whatever its activation, from being computed from its active neurons alone; None: nothing."""
    if not ffn.family.is_gated:
        return f"an FFN without a gate (family {ffn.family.name}): sparse FFNs are gated"
    if ffn.biases:
        return f"{' and '.join(ffn.biases)} with a bias: sparse FFNs know none"
    hooked = [name for name, part in ffn.projections() if part._forward_hooks]  # such as the second ReLU of dReLU
    return f"{' and '.join(hooked)} with a hook: sparse FFNs know none" if hooked else None


class ExchangedFFNs:
    """The FFN modules of one model instance, exchanged for others and back; other instances stay as they are.

    All of them are exchanged or none: ``make`` is called for every layer before the first module is touched.
    A context manager: leaving it puts the original modules back.
    """

    def __init__(self, model: nn.Module, make: Callable[[FFN], nn.Module]) -> None:
        ffns = find_ffns(model)
        self._places = [_parent_and_name(model, ffn) for ffn in ffns]
        self._original = [ffn.module for ffn in ffns]
        self.modules = [make(ffn) for ffn in ffns]
        self.redo()

    def redo(self) -> None:
        """Put the new modules in."""
        self._put(self.modules)

    def undo(self) -> None:
        """Put the original modules back."""
        self._put(self._original)

    def count(self) -> int:
        """How many layers run a new module now."""
        current = (getattr(parent, name) for parent, name in self._places)
        return sum(now is new for now, new in zip(current, self.modules, strict=True))

    def _put(self, modules: Sequence[nn.Module]) -> None:
        for (parent, name), module in zip(self._places, modules, strict=True):
            setattr(parent, name, module)

    def __enter__(self) -> ExchangedFFNs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _parent_and_name(model: Any, ffn: FFN) -> tuple[nn.Module, str]:
    path, _, name = f"{ffn.family.layers}.{ffn.layer}.{ffn.family.ffn}".rpartition(".")
    parent = model.get_submodule(path)
    assert getattr(parent, name) is ffn.module
    return parent, name


def decode_bytes(model: nn.Module, sparsity: float = 0.0) -> float:
    """Bytes of weights that a token at batch 1 reads when up and down are skipped for that share of the neurons.

    Without a gate only down can be skipped: up is what says which neurons live.

    Every matrix is read once per token, save the embedding table (one row), unless it is also the output layer.
    """
    output = model.get_output_embeddings().weight  # type: ignore[operator]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    read = sum(p.nbytes for p in model.parameters() if p is not embedding or p is output)
    skipped = sum(
        (2 if f.family.is_gated else 1) * f.d_ff * f.d_model * f.down_weight.itemsize for f in find_ffns(model)
    )
    return read - sparsity * skipped
