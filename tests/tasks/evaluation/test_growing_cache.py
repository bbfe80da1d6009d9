"""A cache that grows in place holds what one that grows by concatenation does, whatever rows leave in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from tasks.evaluation import decoding, growing_cache
from tasks.evaluation.decoding import decode_greedily
from tasks.evaluation.growing_cache import give_room
from tests.tasks.held_out_files import make_model

PROMPTS = [[7], [9, 8, 3], [200, 201, 202, 203, 204, 205, 206], [7, 7]]


def filled(batch: int, seq: int, generator: torch.Generator) -> tuple[DynamicCache, Tensor, Tensor]:
    cache = DynamicCache()
    keys, values = (torch.randn(batch, 2, seq, 4, generator=generator) for _ in range(2))
    cache.update(keys, values, 0)
    return cache, keys, values


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.integers(1, 5), st.just("leave")), max_size=12), st.integers(1, 4), st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_concatenation(changes: list[Any], seq: int, seed: int) -> None:
    """Tokens by ones and more, rows that leave (also the last ones, so that the first stay where they were)."""
    g = torch.Generator().manual_seed(seed)
    growing_cache.SPARE, before = 3, growing_cache.SPARE
    try:
        cache, keys, values = filled(4, seq, g)
        give_room(cache)
        for change in changes:
            if change == "leave":
                if len(keys) > 1:
                    kept = torch.randperm(len(keys), generator=g)[:-1].sort().values
                    cache.batch_select_indices(kept)
                    keys, values = keys[kept], values[kept]
                continue
            new = [torch.randn(len(keys), 2, change, 4, generator=g) for _ in range(2)]
            keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
            found = cache.update(*new, 0)
            assert torch.equal(found[0], keys)
            assert torch.equal(found[1], values)
        assert cache.get_seq_length() == keys.shape[2]
    finally:
        growing_cache.SPARE = before


def test_most_tokens_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_cache, "SPARE", 8)
    g = torch.Generator().manual_seed(0)
    cache, *_ = filled(2, 5, g)
    give_room(cache)
    places = []
    for _ in range(20):
        keys, _ = cache.update(*(torch.randn(2, 2, 1, 4, generator=g) for _ in range(2)), 0)
        places.append(keys.data_ptr())
    assert len(set(places)) == 3, "20 tokens by nines"


def test_it_keeps_what_attention_casts_to() -> None:
    g = torch.Generator().manual_seed(0)
    cache, keys, _ = filled(2, 5, g)
    give_room(cache, torch.bfloat16)
    new = torch.randn(2, 2, 1, 4, generator=g)
    found, _ = cache.update(new, new, 0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([keys, new], 2).bfloat16())


def test_layers_with_a_window_stay_as_they_are() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        new = torch.randn(1, 1, 3, 2, generator=g)
        give_room(cache)
        keys, _ = cache.update(new, new, 0)
    assert keys.shape[2] == 3 + 3
    give_room(object())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_decodes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """Attention under autocast casts the keys it is given to bf16 as well."""
    model, _ = make_model(tmp_path)
    ends = [3, 9, 12, 12]
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1].clone()))

    def decoded() -> tuple[list[list[int]], list[Tensor]]:
        seen.clear()
        counts = iter(ends)
        stops: dict[int, int] = {}

        def is_finished(ids: list[int]) -> bool:
            return len(ids) >= stops.setdefault(id(ids), next(counts, 12))

        return decode_greedily(model, PROMPTS, precision, max_new=12, is_finished=is_finished), list(seen)

    monkeypatch.setattr(growing_cache, "SPARE", 4)
    tokens, logits = decoded()
    monkeypatch.setattr(decoding, "give_room", lambda cache, dtype=None: None)
    expected, logits_before = decoded()
    assert tokens == expected
    assert [len(row) for row in tokens] == ends
    for ours, theirs in zip(logits, logits_before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if precision == "fp32" else 0.02)
