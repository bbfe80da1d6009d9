"""Attention to a shared beginning against attention to copies of it, in float64, and as a model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.evaluation import decoding, shared_prefix
from tasks.evaluation.decoding import decode_greedily, read_prefix
from tasks.evaluation.shared_prefix import attend, attending, can_share
from tests.prosparse_core.models import MODEL_TYPES
from tests.prosparse_core.models import tiny as tiny_of
from tests.tasks.held_out_files import make_model

SHARED = list(range(10, 50))
PROMPTS = [[*SHARED, 7], [*SHARED, 9, 8, 3], [*SHARED, 200, 201, 202, 203, 204, 205, 206], [*SHARED, 7, 7]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_model(tmp_path_factory.mktemp("tiny"))[0]


def twin(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
    """softmax over the beginning, copied for each row, and the row's own tokens; float64."""
    batch, heads, seq, dim = query.shape
    groups = heads // key.shape[1]
    whole = [torch.cat([s.expand(batch, -1, -1, -1), own], 2) for s, own in zip(shared, (key, value), strict=True)]
    keys, values = (t.repeat_interleave(groups, 1).double() for t in whole)
    scores = query.double() @ keys.transpose(-1, -2) * dim**-0.5
    seen = torch.cat([torch.ones(batch, 1, seq, shared[0].shape[1], dtype=torch.bool), mask], -1)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5), st.integers(1, 9),
    st.sampled_from([0.1, 3.0, 30.0]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_attention_to_copies(
    batch: int, kv: int, groups: int, seq: int, before: int, shared: int, scale: float, padded: bool, seed: int
) -> None:
    """Any grouping of heads, own tokens before the queries, filler on the left, scores from flat to one-hot."""
    g = torch.Generator().manual_seed(seed)
    own, dim = before + seq, 4

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    query, key, value = scale * some(batch, kv * groups, seq, dim), some(batch, kv, own, dim), some(batch, kv, own, dim)
    beginning = some(kv, shared, dim), some(kv, shared, dim)
    mask = torch.ones(seq, own, dtype=torch.bool).tril(own - seq).expand(batch, 1, seq, own).clone()
    if padded:
        mask[0, :, :, : own - 1] = False  # all but the last query of the first row are filler and see none of their own
    ours = attend(query, key, value, mask if padded else None, *beginning, scaling=dim**-0.5)
    torch.testing.assert_close(ours.double(), twin(query, key, value, mask, beginning), rtol=1e-4, atol=1e-5)


def test_the_beginning_may_be_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, h, 5, 8, generator=g) for h in (6, 2, 2))
    beginning = [torch.randn(2, 11, 8, generator=g) for _ in range(2)]
    whole = attend(query, key, value, None, *beginning, scaling=0.3)
    monkeypatch.setattr(shared_prefix, "MAX_SCORES", 2 * 11 * 7)
    torch.testing.assert_close(attend(query, key, value, None, *beginning, scaling=0.3), whole, rtol=1e-6, atol=1e-6)


def decoded(tiny: Any, precision: Any) -> tuple[Tensor, list[list[int]]]:
    """(logits behind the prompts, tokens) in a precision."""
    prefix = read_prefix(tiny, SHARED, precision)
    seen: list[Tensor] = []
    hook = tiny.lm_head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1].float()))
    try:
        found = decode_greedily(
            tiny, PROMPTS, precision, max_new=12, is_finished=lambda ids: False, prefix=prefix
        )  # fmt: skip
    finally:
        hook.remove()
    return seen[0], found


def test_a_model_decodes_as_with_copies(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the same tokens, and logits to rounding; in bf16 no further from those of fp32 than copies are."""
    ours, tokens = decoded(tiny, "fp32")
    rounded, _ = decoded(tiny, "bf16")
    monkeypatch.setattr(decoding, "can_share", lambda model, cache: False)
    copied, expected = decoded(tiny, "fp32")
    torch.testing.assert_close(ours, copied, rtol=1e-4, atol=1e-4)
    assert tokens == expected
    errors = [(logits - copied).square().mean() for logits in (rounded, decoded(tiny, "bf16")[0])]
    assert errors[0] < 2 * errors[1]
    assert tiny.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_known_family_answers_as_each_prompt_alone(model_type: str) -> None:
    """Whether its attention can be shared or not; with weights that are large enough to disagree."""
    model = tiny_of(model_type)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(4)
    prompts = [[*SHARED, 7], [*SHARED, 9, 8, 3], [*SHARED, 20, 21, 22, 23, 24, 25, 26], [*SHARED, 7, 7]]
    told: dict[str, Any] = {"max_new": 10, "is_finished": lambda ids: False}
    prefix = read_prefix(model, SHARED, "fp32")
    alone = [decode_greedily(model, [prompt], "fp32", **told)[0] for prompt in prompts]
    assert decode_greedily(model, prompts, "fp32", prefix=prefix, **told) == alone


def test_what_is_not_plain_attention_is_not_shared(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    cache = read_prefix(tiny, SHARED, "fp32").cache  # type: ignore[union-attr]
    assert can_share(tiny, cache)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8)]
    assert not can_share(tiny, sliding), "a window forgets the beginning"
    assert not can_share(tiny, object())
    uneven = DynamicCache()
    uneven.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4), 0)
    assert not can_share(tiny, uneven)
    monkeypatch.setattr(type(tiny), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert not can_share(tiny, cache)


def test_the_model_is_as_before_after_a_failure(tiny: Any) -> None:
    cache = read_prefix(tiny, SHARED, "fp32").cache  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="in between"), attending(tiny, cache):
        raise RuntimeError("in between")
    assert tiny.config._attn_implementation == "sdpa"


def test_it_is_not_copied_for_each_row(tiny: Any) -> None:
    """The cache that decoding carries along holds the rows' own tokens alone."""
    prefix = read_prefix(tiny, SHARED, "fp32")
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        lengths.append(out.past_key_values.get_seq_length())

    hook = tiny.register_forward_hook(note, with_kwargs=True)
    try:
        decode_greedily(tiny, PROMPTS, "fp32", max_new=3, is_finished=lambda ids: False, prefix=prefix)
    finally:
        hook.remove()
    assert lengths == [7, 8, 9]
