"""Attention of many rows to one beginning: its keys and values are read once for all of them, never copied for each.

softmax over [beginning, own tokens] is the mean of the softmax over either, weighted by their sums of exponentials
(as in FlashAttention, arXiv 2205.14135, section 3.1). What is computed is what attention computes, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NAME = "prosparse_shared_prefix"
MAX_SCORES = 1 << 25
"""At most this many attention scores to the beginning at a time (128 MiB)."""


def can_share(model: Any, cache: Any) -> bool:
    """Whether the model's attention can be replaced by :func:`attend`: plain, through transformers' interface, keys and
    values of one size, and a cache that keeps all it is given."""
    from transformers.cache_utils import DynamicLayer

    def is_plain(layer: Any) -> bool:
        return type(layer) is DynamicLayer and layer.is_initialized and layer.keys.shape == layer.values.shape

    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and model._can_set_attn_implementation()
        and all(map(is_plain, getattr(cache, "layers", [None])))
    )


@contextlib.contextmanager
def attending(model: Any, cache: Any) -> Iterator[None]:
    """Within, every attention of ``model`` also sees the keys and values of ``cache``, one row, before its own.

    The caller gives positions that go on after them and a cache of the rows' own tokens.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    shared = [(layer.keys[0].float(), layer.values[0].float()) for layer in cache.layers]

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        unknown = {"softcap", "s_aux", "position_bias"} & {k for k, v in options.items() if v is not None}
        assert not unknown, f"attention with {unknown}"
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        with torch.autocast(query.device.type, enabled=False):
            out = attend(query, key, value, attention_mask, *shared[module.layer_idx], scaling=scaling)
        return out.to(value.dtype), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        shared.clear()  # the function stays registered


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shared_key: Tensor,
    shared_value: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """What attention to a shared beginning and to each row's own tokens gives, float32 [batch, seq, heads, head_dim].

    Args:
        query: [batch, heads, seq, head_dim], any float dtype.
        key: [batch, kv_heads, own, head_dim] of each row's own tokens, the last ``seq`` of which are the queries'.
        value: like ``key``.
        mask: bool [batch, 1, seq, own], true where a query may look; None: causal.
        shared_key: float32 [kv_heads, shared, head_dim] of the beginning, at which every query may look.
        shared_value: like ``shared_key``.
        scaling: of the scores.
    """
    import torch

    batch, heads, seq, dim = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    query_BKGTD = (query.float() * scaling).view(batch, kv_heads, groups, seq, dim)
    if mask is None:
        mask = torch.ones(seq, own, dtype=torch.bool, device=query.device).tril(own - seq)[None, None]

    scores = query_BKGTD.flatten(2, 3) @ key.float().transpose(-1, -2)
    scores = scores.view(batch, kv_heads, groups, seq, own).masked_fill(~mask[:, :, None], -torch.inf)
    # A row of filler sees none of its own.
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights.flatten(2, 3) @ value.float()).view(batch, kv_heads, groups, seq, dim)

    rows_KND = query_BKGTD.transpose(0, 1).reshape(kv_heads, -1, dim)
    size = max(1, MAX_SCORES // (kv_heads * shared_key.shape[1]))
    parts = [_to_shared(rows, shared_key, shared_value) for rows in rows_KND.split(size, dim=1)]
    shape = (kv_heads, batch, groups, seq, -1)
    out_s, peak_s, total_s = (torch.cat(found, dim=1).view(shape).transpose(0, 1) for found in zip(*parts, strict=True))

    highest = torch.maximum(peak, peak_s)
    weight, weight_s = (peak - highest).exp(), (peak_s - highest).exp()
    out = (out * weight + out_s * weight_s) / (total * weight + total_s * weight_s)
    return out.view(batch, heads, seq, dim).transpose(1, 2).contiguous()


def _to_shared(rows: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum of values, peak of the scores, sum of exponentials) of rows [kv_heads, n, head_dim]."""
    scores = rows @ key.transpose(-1, -2)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    return weights @ value, peak, weights.sum(-1, keepdim=True)
