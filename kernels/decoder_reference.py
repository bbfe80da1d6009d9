"""The readable truth of the native decoder: a LLaMA-like model over a whole sequence, in torch, without a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.decoder_weights import DecoderWeights, LayerWeights


def logits(
    weights: DecoderWeights,
    tokens: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    cutoffs: Sequence[float] | None = None,
    accumulate: torch.dtype = torch.float64,
) -> Tensor:
    """``[n]`` tokens -> ``[n, V]``, matrices rounded to ``dtype``, everything computed in ``accumulate``.

    With ``cutoffs``, one a layer, x1 is 0 wherever the layer's predictor gives a probability below it.
    """

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(accumulate)

    x = matrix(weights.embedding)[list(tokens)]
    for i, layer in enumerate(weights.layers):
        normed = _rms_norm(x, layer.attention_norm, weights.eps)
        x = x + _attention(weights, layer, normed, matrix)
        normed = _rms_norm(x, layer.ffn_norm, weights.eps)
        gate = normed @ matrix(layer.gate).T
        if weights.activation == "silu":
            s = gate * gate.sigmoid()
        else:
            live = reference.kept(gate, layer.threshold)
            if cutoffs is not None:
                fc1, fc2 = (matrix(m) for m in weights.predictors[i])
                seen = x if weights.pre_norm else normed
                live &= (seen @ fc1.T).relu() @ fc2.T >= torch.tensor(cutoffs[i], dtype=accumulate).logit()
            s = torch.where(live, gate, torch.zeros_like(gate))
        x = x + (s * (normed @ matrix(layer.up).T)) @ matrix(layer.down).T
    head = weights.embedding if weights.lm_head is None else weights.lm_head
    return _rms_norm(x, weights.final_norm, weights.eps) @ matrix(head).T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(x.dtype)


def _attention(weights: DecoderWeights, layer: LayerWeights, x: Tensor, matrix) -> Tensor:  # type: ignore[no-untyped-def]
    n, d = len(x), weights.cos.shape[1]

    def heads(projection: Tensor, bias: Tensor | None) -> Tensor:
        """[heads, n, d]"""
        y = x @ matrix(projection).T
        return (y if bias is None else y + bias.to(y.dtype)).view(n, -1, d).transpose(0, 1)

    q, k, v = (
        heads(layer.query, layer.query_bias),
        heads(layer.key, layer.key_bias),
        heads(layer.value, layer.value_bias),
    )
    if layer.query_norm is not None and layer.key_norm is not None:
        q, k = _rms_norm(q, layer.query_norm, weights.eps), _rms_norm(k, layer.key_norm, weights.eps)
    cos, sin = weights.cos[:n].to(x.dtype), weights.sin[:n].to(x.dtype)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    group = weights.num_heads // weights.num_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * (d**-0.5 if weights.scale is None else weights.scale)
    back = torch.arange(n)[:, None] - torch.arange(n)[None]
    unseen = (back < 0) | (back >= (n if layer.window is None else layer.window))
    mixed = scores.masked_fill(unseen, -math.inf).softmax(-1) @ v
    y = mixed.transpose(0, 1).reshape(n, -1) @ matrix(layer.out).T
    return y if layer.out_bias is None else y + layer.out_bias.to(y.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
