"""The native decoder against its readable twin on ragged shapes, and against itself: its bits do not depend on how."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import decoder_reference
from kernels.decoder import Decoder, DecoderModel, DecoderWeights, LayerWeights, Sampling

pytestmark = pytest.mark.usefixtures("native")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POSITIONS = 40


def random_weights(
    d_model: int = 24,
    d_ffs: Sequence[int] = (53, 31),
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    vocab: int = 61,
    *,
    tied: bool = True,
    biased: bool = False,
    normed: bool = False,
    thresholds: Sequence[float] = (0.0, 0.3),
    window: int | None = None,
    hidden: int = 0,
    seed: int = 0,
    **changes: Any,
) -> DecoderWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def vector(size: int, mean: float) -> Tensor:
        return mean + 0.3 * torch.randn(size, generator=generator)

    layers = [
        LayerWeights(
            attention_norm=vector(d_model, 1.0),
            query=matrix(heads * head_dim, d_model),
            key=matrix(kv_heads * head_dim, d_model),
            value=matrix(kv_heads * head_dim, d_model),
            out=matrix(d_model, heads * head_dim),
            ffn_norm=vector(d_model, 1.0),
            gate=matrix(d_ff, d_model),
            up=matrix(d_ff, d_model),
            down=matrix(d_model, d_ff),
            query_bias=vector(heads * head_dim, 0.0) if biased else None,
            key_bias=vector(kv_heads * head_dim, 0.0) if biased else None,
            value_bias=vector(kv_heads * head_dim, 0.0) if biased else None,
            out_bias=vector(d_model, 0.0) if biased else None,
            query_norm=vector(head_dim, 1.0) if normed else None,
            key_norm=vector(head_dim, 1.0) if normed else None,
            threshold=threshold,
            window=window,
        )
        for d_ff, threshold in zip(d_ffs, thresholds, strict=True)
    ]
    angles = torch.arange(POSITIONS)[:, None] * 50.0 ** -torch.linspace(0, 1, head_dim // 2)[None]
    angles = torch.cat([angles, angles], -1)
    weights = DecoderWeights(
        layers=layers,
        embedding=torch.randn(vocab, d_model, generator=generator),
        final_norm=vector(d_model, 1.0),
        cos=angles.cos(),
        sin=angles.sin(),
        num_heads=heads,
        num_kv_heads=kv_heads,
        eps=1e-5,
        lm_head=None if tied else matrix(vocab, d_model),
        predictors=[(matrix(hidden, d_model), matrix(d_ff, hidden)) for d_ff in d_ffs] if hidden else (),
    )
    return replace(weights, **changes)


def tokens(count: int, seed: int = 1, vocab: int = 61) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"heads": 1, "kv_heads": 1, "head_dim": 2, "d_model": 5},
    "many heads": {"heads": 6, "kv_heads": 1, "head_dim": 34, "d_model": 37},
    "untied": {"tied": False},
    "biases": {"biased": True},
    "norms of heads": {"normed": True, "biased": True, "scale": 0.21},
    "window": {"window": 3},
    "silu": {"activation": "silu"},
    "wide": {"d_model": 130, "d_ffs": (701, 257), "head_dim": 66, "heads": 2},
}


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_logit_agrees_with_the_twin(error, name, dtype, num_threads):
    weights = random_weights(**VARIANTS[name])
    model, text = DecoderModel(weights, dtype), tokens(21)
    truth = decoder_reference.logits(weights, text, dtype=dtype)
    for ffn in ("dense",) if weights.activation == "silu" else ("dense", "exact", "certified"):
        found = Decoder(model, ffn=ffn, num_threads=num_threads).score(text)
        assert error(found, truth) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([n for n in VARIANTS if n != "silu"]),
    dtype=st.sampled_from(DTYPES),
    num_threads=st.integers(1, 4),
    ffn=st.sampled_from(["dense", "exact", "certified"]),
    cut=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_no_bit_depends_on_threads_blocks_or_skipping(name, dtype, num_threads, ffn, cut, seed):
    model, text = DecoderModel(random_weights(**VARIANTS[name], seed=seed), dtype), tokens(21, seed)
    alone = Decoder(model, ffn="exact")
    one_by_one = torch.stack([alone.feed([token]) for token in text])
    decoder = Decoder(model, ffn=ffn, num_threads=num_threads, capacity=21)
    assert torch.equal(torch.cat([decoder.score(text[:cut]), decoder.score(text[cut:])]), one_by_one)
    decoder.rewind(cut)
    assert torch.equal(decoder.feed(text[cut:]), one_by_one[-1])
    other = Decoder(model, ffn="dense", capacity=30)
    other.copy_cache(decoder)
    other.rewind(20)
    assert torch.equal(other.feed(text[20:]), one_by_one[-1])


def test_a_prompt_that_something_else_has_read():
    model, text = DecoderModel(random_weights()), tokens(12)
    alone = Decoder(model, capacity=12)
    alone.feed(text[:9])
    keys, values = ([part[:, :9].clone() for part in side] for side in alone._cache)
    truth = [alone.feed((token,)) for token in text[9:]]
    dense, exact = (Decoder(model, ffn=ffn, capacity=20) for ffn in ("dense", "exact"))
    sharing = Decoder(model, ffn="certified", capacity=20, cache_of=exact)
    for decoder in (dense, exact, sharing):
        decoder.fill_cache(keys, values)
    for place, token in enumerate(text[9:]):  # in turns, two of them in one cache
        for decoder in (dense, exact, sharing):
            assert torch.equal(decoder.feed((token,)), truth[place])
    with pytest.raises(ValueError, match="one model and one capacity"):
        Decoder(model, capacity=21, cache_of=exact)
    with pytest.raises(ValueError, match="do not fit into a cache of 8"):
        Decoder(model, capacity=8).fill_cache(keys, values)
    for wrong in ((keys[:1], values[:1]), (keys, values[:1]), ([k[:1] for k in keys], values)):
        with pytest.raises(ValueError, match="one a layer"):
            exact.fill_cache(*wrong)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predicted_neurons_alone_are_computed(error, dtype, pre_norm):
    weights = random_weights(d_ffs=(701, 257), hidden=9, pre_norm=pre_norm)
    model, text = DecoderModel(weights, dtype), tokens(12)
    cutoffs = [0.45, 0.5]
    truth = decoder_reference.logits(weights, text, dtype=dtype, cutoffs=cutoffs)
    exact = Decoder(model)
    exact.score(text)
    for num_threads in (1, 2):
        decoder = Decoder(model, ffn="predicted", cutoffs=cutoffs, num_threads=num_threads)
        assert error(decoder.score(text), truth) < 1e-5
        assert 0 < decoder.num_live < exact.num_live
        assert decoder.num_live <= decoder.num_gates < exact.num_gates == 12 * (701 + 257)
    every = Decoder(model, ffn="predicted", cutoffs=[0.0, -1.0])
    assert torch.equal(every.score(text), Decoder(model).score(text)), "everything predicted is exact, to the bit"
    none = Decoder(model, ffn="predicted", cutoffs=[1.0, 1.0])
    none.score(text)
    assert (none.num_live, none.num_gates) == (0, 0)


def test_counts_are_those_of_the_twin():
    weights = random_weights(d_ffs=(701, 257), thresholds=(0.0, 2.0))
    model = DecoderModel(weights)
    dense, exact, certified = (Decoder(model, ffn=ffn) for ffn in ("dense", "exact", "certified"))
    for token in tokens(5):
        for decoder in (dense, exact, certified):
            decoder.feed([token])
        assert dense.num_live == exact.num_live == certified.num_live > 0
        assert dense.num_gates == exact.num_gates == 958
        assert certified.num_live <= certified.num_gates < 958
    raised = Decoder(model, thresholds=[1.0, 5.0])
    raised.feed([3])
    assert raised.num_live < dense.num_live
    lifted = replace(weights, layers=[replace(one, threshold=t) for one, t in zip(weights.layers, (1.0, 5.0))])  # noqa: B905
    assert torch.equal(Decoder(DecoderModel(lifted)).feed([3]), Decoder(model, thresholds=[1.0, 5.0]).feed([3]))


def test_bytes_are_those_of_the_rows_that_were_computed():
    weights = random_weights(d_ffs=(701, 257), hidden=9, window=3, tied=False)
    for dtype in (torch.float32, torch.float16):
        model, item = DecoderModel(weights, dtype), dtype.itemsize
        attention = 2 * (8 * 6 + 24) * 24 * item
        cache = 2 * 2 * 3 * 2 * 6 * 4  # layers, keys and values, window, heads, numbers, bytes
        fixed = attention + 61 * 24 * item + cache
        screen = 958 * (64 + 16)
        read = {}
        for ffn in ("dense", "exact", "certified", "predicted"):
            decoder = Decoder(model, ffn=ffn)
            for token in tokens(6):
                decoder.feed([token])
            live, gates = decoder.num_live, decoder.num_gates
            assert decoder.live_share == live / 958
            rows = 958 * 3 if ffn == "dense" else gates + 2 * live
            extra = {"certified": screen, "predicted": (958 + 2 * 24) * 9 * item}.get(ffn, 0)
            assert decoder.bytes_read == fixed + rows * 24 * item + extra
            read[ffn] = decoder.bytes_read
        assert read["predicted"] < read["exact"] < read["dense"]


def test_greedy_generation_is_the_largest_logit_again_and_again():
    weights = random_weights(thresholds=(0.0, 0.0))
    model, text = DecoderModel(weights), tokens(5)
    expected = list(text)
    for _ in range(9):
        expected.append(int(decoder_reference.logits(weights, expected)[-1].argmax()))
    decoder = Decoder(model, ffn="certified", capacity=13)
    assert list(decoder.generate(text, 9)) == expected[5:]
    assert decoder.length == 13, "the last token is chosen, not fed"
    decoder.rewind()
    stop = expected[7]
    until = expected[5:].index(stop)
    assert list(decoder.generate(text, 9, stop={stop})) == expected[5 : 5 + until + 1]


def test_drawn_tokens_follow_the_seed():
    model = DecoderModel(random_weights())

    def draw(**how: Any) -> list[int]:
        return list(Decoder(model).generate(tokens(4), 20, sampling=Sampling(**how)))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = list(Decoder(model).generate(tokens(4), 20))
    assert draw(seed=1, top_k=1) == draw(seed=5, top_p=1e-6) == draw(seed=3, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
        {"top_k": 1000, "top_p": 1.0},
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(how):
    from transformers.generation import logits_process

    logits = torch.randn(61, generator=torch.Generator().manual_seed(2)) * 3
    scores = logits[None] / how.get("temperature", 1.0)
    if "top_k" in how:
        scores = logits_process.TopKLogitsWarper(how["top_k"])(None, scores)
    if "top_p" in how:
        scores = logits_process.TopPLogitsWarper(how["top_p"])(None, scores)
    torch.testing.assert_close(Sampling(**how).probabilities(logits), scores[0].softmax(0))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_sampling_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**how)


def with_layer(**changes: Any) -> DecoderWeights:
    weights = random_weights()
    return replace(weights, layers=[weights.layers[0], replace(weights.layers[1], **changes)])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (with_layer(out=torch.full((24, 24), math.nan)), "layer 1: out holds a number that is not finite"),
        (with_layer(ffn_norm=torch.full((24,), math.inf)), "layer 1: ffn_norm holds a number"),
        (with_layer(key=torch.zeros(24, 24)), r"layer 1: key is torch.float32 \(24, 24\)"),
        (with_layer(down=torch.zeros(31, 24)), "layer 1: down"),
        (with_layer(gate=torch.zeros(31, 24).long()), "layer 1: gate is torch.int64"),
        (with_layer(query_bias=torch.zeros(24)), "go together"),
        (with_layer(key_norm=torch.zeros(6)), "go together"),
        (with_layer(threshold=-1.0), "threshold is -1.0"),
        (with_layer(window=0), "window is 0"),
        (random_weights(heads=3), "must be a multiple"),
        (random_weights(activation="gelu"), "activation is 'gelu'"),
        (random_weights(lm_head=torch.zeros(60, 24)), "lm_head"),
        (random_weights(eps=-1.0), "eps is -1.0"),
        (random_weights(layers=[]), "without layers"),
        (random_weights(sin=torch.zeros(40, 8)), "sin"),
        (random_weights(cos=torch.full((40, 6), math.nan)), "cos or sin"),
        (random_weights(predictors=[(torch.zeros(3, 24), torch.zeros(53, 3))]), "1 predictors for 2 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        DecoderModel(weights)


def test_weights_beyond_the_range_of_float16_are_refused():
    weights = with_layer(up=torch.full((31, 24), 1e5))
    with pytest.raises(ValueError, match=r"layer 1: w_up .* beyond the range of torch\.float16"):
        DecoderModel(weights, torch.float16)
    DecoderModel(weights, torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        DecoderModel(weights, torch.float64)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"ffn": "sparse"}, "ffn is 'sparse'"),
        ({"ffn": "predicted"}, "no predictors"),
        ({"cutoffs": [0.5, 0.5]}, "cutoffs belong to"),
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 41}, "1 to 40"),
        ({"thresholds": [0.1]}, "1 thresholds for 2 layers"),
        ({"thresholds": [0.1, math.nan]}, "not a number"),
        ({"num_threads": 257}, "num_threads"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        Decoder(DecoderModel(random_weights()), **settings_)


def test_silu_is_dense_only():
    with pytest.raises(ValueError, match="SiLU has no zeros"):
        Decoder(DecoderModel(random_weights(activation="silu")), ffn="exact")


def test_bad_tokens_are_refused_and_change_nothing():
    decoder = Decoder(DecoderModel(random_weights()), capacity=8)
    decoder.feed([1, 2, 3])
    for call, message in (
        (lambda: decoder.feed([]), "no tokens"),
        (lambda: decoder.feed([5, 61]), "token 61 at place 1"),
        (lambda: decoder.score([-1]), "token -1 at place 0"),
        (lambda: decoder.feed([0] * 6), "6 tokens after 3 do not fit into a cache of 8"),
        (lambda: decoder.generate([], 3), "no tokens"),
        (lambda: decoder.generate([4], 0), "max_new_tokens is 0"),
        (lambda: decoder.generate([4, 4], 5), "need 9 positions, the cache has 8"),
        (lambda: decoder.rewind(4), "cannot rewind to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert decoder.length == 3
    assert len(list(decoder.generate([4, 4], 4))) == 4


def test_an_overflow_is_said_not_hidden():
    decoder = Decoder(DecoderModel(with_layer(down=torch.full((24, 31), 3e38), up=torch.full((31, 24), 3e38))))
    with pytest.raises(ValueError, match="layer 1 gives a number that is not finite"):
        decoder.feed([1, 2])
    assert decoder.length == 0


def test_decoders_are_not_copied_with_their_addresses():
    with pytest.raises(TypeError, match="addresses"):
        copy.deepcopy(Decoder(DecoderModel(random_weights())))
    with pytest.raises(ValueError, match="another model"):
        Decoder(DecoderModel(random_weights())).copy_cache(Decoder(DecoderModel(random_weights(head_dim=8))))
