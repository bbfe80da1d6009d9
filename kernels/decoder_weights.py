"""The weights of a LLaMA-like model as the native decoder reads them: checked once, packed once, shared by decoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels import cpu
from kernels.certified import MAX_D_MODEL, Int8Gate, quantise
from kernels.reference import check_threshold

ACTIVATIONS = ("relu", "silu")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; matrices as nn.Linear has them, ``[outputs, inputs]``. D is the width, H and K count query and
    key-value heads of d numbers each.
    """

    attention_norm: Tensor
    """``[D]``, as are all norms but those of heads."""
    query: Tensor
    """``[H d, D]``, rotated in halves: number i of a head turns with number i + d / 2."""
    key: Tensor
    """``[K d, D]``; value likewise."""
    value: Tensor
    out: Tensor
    """``[D, H d]``."""
    ffn_norm: Tensor
    gate: Tensor
    """``[F, D]``; up likewise."""
    up: Tensor
    down: Tensor
    """``[D, F]``."""
    query_bias: Tensor | None = None
    """The three go together."""
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    out_bias: Tensor | None = None
    query_norm: Tensor | None = None
    """``[d]``, over each head before it is rotated; with ``key_norm`` or not at all."""
    key_norm: Tensor | None = None
    threshold: float = 0.0
    """FATReLU's; 0 is ReLU. Unused with SiLU."""
    window: int | None = None
    """Positions a token sees, itself included; None: all before it."""


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A whole model. ``cos`` and ``sin`` ``[positions, d]`` hold the rotation of each position, scaling included.

    ``predictors``: (fc1 ``[hidden, D]``, fc2 ``[F, hidden]``) a layer, or none; ``pre_norm``: they read the residual
    stream before the FFN's norm instead of its output.
    """

    layers: Sequence[LayerWeights]
    embedding: Tensor
    final_norm: Tensor
    cos: Tensor
    sin: Tensor
    num_heads: int
    num_kv_heads: int
    eps: float
    lm_head: Tensor | None = None
    """``[vocabulary, D]``; None: the embedding."""
    scale: float | None = None
    """Of the attention's scores; None: 1 / sqrt(d)."""
    activation: str = "relu"
    predictors: Sequence[tuple[Tensor, Tensor]] = ()
    pre_norm: bool = False


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What the kernels read of one layer: matrices in the model's dtype, ``w_down_t`` is ``[F, D]``."""

    qkv: Tensor
    out: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down_t: Tensor
    fc1: Tensor | None
    fc2: Tensor | None
    attention_norm: Tensor
    ffn_norm: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None


class DecoderModel:
    """A model's weights in one block of memory, in the order in which a token reads them.

    ``dtype`` is that of the matrices: float32, bfloat16 or float16; norms, biases and rotations are float32. ValueError
    for wrong shapes, an unknown activation, bad thresholds, and numbers that are not finite or leave float16;
    RuntimeError where the kernels cannot be built.
    """

    def __init__(self, weights: DecoderWeights, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in cpu.WEIGHT_DTYPES:
            raise ValueError(f"dtype is {dtype}: float32, bfloat16 or float16")
        if weights.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {weights.activation!r}: one of {', '.join(ACTIVATIONS)}")
        self.d_model, self.vocab = weights.embedding.shape[1], weights.embedding.shape[0]
        self.num_heads, self.num_kv_heads = weights.num_heads, weights.num_kv_heads
        self.max_positions, self.head_dim = weights.cos.shape
        _check(weights, self.head_dim)
        self.dtype, self.activation, self.eps = dtype, weights.activation, weights.eps
        self.scale = self.head_dim**-0.5 if weights.scale is None else weights.scale
        self.thresholds = [check_threshold(layer.threshold) for layer in weights.layers]
        self.windows = [layer.window for layer in weights.layers]
        self.pre_norm, self.has_predictors = weights.pre_norm, bool(weights.predictors)
        self._pack(weights)
        self._screens: list[tuple[Int8Gate, Tensor]] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def _pack(self, weights: DecoderWeights) -> None:
        parts: list[dict[str, Tensor | None]] = []
        for i, layer in enumerate(weights.layers):
            fc1, fc2 = weights.predictors[i] if weights.predictors else (None, None)
            biases = [b for b in (layer.query_bias, layer.key_bias, layer.value_bias) if b is not None]
            parts.append(
                {
                    "attention_norm": layer.attention_norm,
                    "qkv": torch.cat([layer.query.detach(), layer.key.detach(), layer.value.detach()]).to(self.dtype),
                    "qkv_bias": torch.cat(biases) if biases else None,
                    "query_norm": layer.query_norm,
                    "key_norm": layer.key_norm,
                    "out": layer.out,
                    "out_bias": layer.out_bias,
                    "ffn_norm": layer.ffn_norm,
                    "fc1": fc1,
                    "fc2": fc2,
                    "w_gate": layer.gate,
                    "w_up": layer.up,
                    "w_down_t": layer.down.t(),
                }
            )
        head = None if weights.lm_head is weights.embedding else weights.lm_head
        shared = {"final_norm": weights.final_norm, "lm_head": head, "embedding": weights.embedding}
        named = [(f"layer {i}: {k}", v) for i, part in enumerate(parts) for k, v in part.items() if v is not None]
        named += [(k, v) for k, v in shared.items() if v is not None]
        plain = [v.detach() if v.ndim > 1 else v.detach().float() for _, v in named]
        packed = dict(zip((name for name, _ in named), cpu.pack(plain, self.dtype), strict=True))
        for (name, source), tensor in zip(named, packed.values(), strict=True):
            if not bool(tensor.isfinite().all()):
                beyond = "" if not bool(source.isfinite().all()) else f", beyond the range of {self.dtype}"
                raise ValueError(f"{name} holds a number that is not finite{beyond}")
        self.layers = [
            PackedLayer(**{f.name: packed.get(f"layer {i}: {f.name}") for f in fields(PackedLayer)})  # type: ignore[arg-type]
            for i in range(len(parts))
        ]
        self.final_norm, self.embedding = packed["final_norm"], packed["embedding"]
        self.lm_head = packed.get("lm_head", self.embedding)
        self.cos, self.sin = (t.detach().float().contiguous() for t in (weights.cos, weights.sin))
        if not bool(self.cos.isfinite().all() and self.sin.isfinite().all()):
            raise ValueError("cos or sin holds a number that is not finite")

    def screens(self) -> list[tuple[Int8Gate, Tensor]]:
        """The 8-bit gate of every layer with its packed bounds, made when the first certified decoder asks."""
        if self._screens is None:
            if self.d_model > MAX_D_MODEL:
                raise ValueError(f"d_model is {self.d_model}: the certified gate takes at most {MAX_D_MODEL}")
            step = cpu.load().screen_step
            gates = [quantise(layer.w_gate, step) for layer in self.layers]
            parts = cpu.pack([t for gate in gates for t in (gate.packed_bounds(), gate.rows)])
            self._screens = [
                (Int8Gate(rows, g.scale, g.spread, g.norm, g.total, g.largest_norm), bounds)
                for g, bounds, rows in zip(gates, parts[::2], parts[1::2], strict=True)
            ]
        return self._screens


def _check(weights: DecoderWeights, head_dim: int) -> None:
    """Every shape follows from the embedding, the heads and the first matrix of each FFN."""
    (vocab, d_model), heads, kv_heads = weights.embedding.shape, weights.num_heads, weights.num_kv_heads
    if not weights.layers:
        raise ValueError("a model without layers")
    if heads < 1 or kv_heads < 1 or heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"{heads} heads, {kv_heads} key-value heads, {head_dim} numbers a head: heads must be a multiple of "
            "key-value heads, and heads must have halves to rotate"
        )
    if not math.isfinite(weights.eps) or weights.eps < 0:
        raise ValueError(f"eps is {weights.eps}: it must be a finite number of at least 0")
    if weights.predictors and len(weights.predictors) != len(weights.layers):
        raise ValueError(f"{len(weights.predictors)} predictors for {len(weights.layers)} layers")
    _expect("final_norm", weights.final_norm, (d_model,))
    _expect("sin", weights.sin, tuple(weights.cos.shape))
    if weights.lm_head is not None:
        _expect("lm_head", weights.lm_head, (vocab, d_model))
    q, k = heads * head_dim, kv_heads * head_dim
    for i, layer in enumerate(weights.layers):
        d_ff = layer.gate.shape[0]
        shapes = {
            "attention_norm": (d_model,), "query": (q, d_model), "key": (k, d_model), "value": (k, d_model),
            "out": (d_model, q), "ffn_norm": (d_model,), "gate": (d_ff, d_model), "up": (d_ff, d_model),
            "down": (d_model, d_ff), "query_bias": (q,), "key_bias": (k,), "value_bias": (k,), "out_bias": (d_model,),
            "query_norm": (head_dim,), "key_norm": (head_dim,),
        }  # fmt: skip
        for name, shape in shapes.items():
            tensor = getattr(layer, name)
            if tensor is not None:
                _expect(f"layer {i}: {name}", tensor, shape)
        for together in (("query_bias", "key_bias", "value_bias"), ("query_norm", "key_norm")):
            if len({getattr(layer, name) is None for name in together}) > 1:
                raise ValueError(f"layer {i}: {', '.join(together)} go together: all of them or none")
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"layer {i}: window is {layer.window}: at least 1, or None")
        if weights.predictors:
            fc1, fc2 = weights.predictors[i]
            _expect(f"layer {i}: fc1", fc1, (fc1.shape[0], d_model))
            _expect(f"layer {i}: fc2", fc2, (d_ff, fc1.shape[0]))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or 0 in shape or not tensor.is_floating_point() or not tensor.is_cpu:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: expected {shape} on cpu")
