"""Decoding against transformers' own, exchanged FFNs on one instance only, and the limit by hand."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens
from torch import nn

from prosparse_core.decode import ExchangedFFNs, GreedyDecoder, decode_bytes, ffn_thresholds
from prosparse_core.errors import BadInput
from prosparse_core.families import FFN, find_ffns
from prosparse_core.substitute import use_relu, use_thresholds


class Doubled(nn.Module):
    """Some other FFN."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn.module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.ffn(x)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "qwen3", "phi3", "gpt2", "opt", "bloom", "falcon", "minicpm"]
)
def test_the_tokens_are_those_of_generate(model_type: str) -> None:
    model = tiny(model_type, seed=3)
    prompt = tokens(batch=1, length=7)
    decoder = GreedyDecoder(model, prompt, "process_cpu")
    seconds = [decoder.step() for _ in range(11)]
    assert all(s > 0 for s in seconds)
    model.generation_config.eos_token_id = None  # the decoder goes on after the end of the sequence
    expected = model.generate(prompt, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(prompt))
    assert decoder.tokens == expected[0, 7:].tolist()
    with torch.no_grad():
        whole = model(input_ids=torch.cat([prompt, torch.tensor([decoder.tokens[:-1]])], 1)).logits[0, -1]
    torch.testing.assert_close(decoder.logits, whole, rtol=1e-4, atol=1e-5)


def test_thresholds_are_read_off_the_activations() -> None:
    model = tiny(hidden_act="relu")
    assert ffn_thresholds(model) == [0.0, 0.0, 0.0]
    use_relu(model)
    assert ffn_thresholds(model) == [0.0, 0.0, 0.0]
    use_thresholds(model, [0.0, 0.25, 0.5])
    assert ffn_thresholds(model) == [0.0, 0.25, 0.5]


def test_an_ffn_without_exact_zeros_or_with_a_bias_is_refused() -> None:
    with pytest.raises(BadInput, match="layer 0: the activation is SiLU"):
        ffn_thresholds(tiny())
    with pytest.raises(BadInput, match="layer 0: gate and up and down with a bias"):
        ffn_thresholds(tiny(hidden_act="relu", mlp_bias=True))
    with pytest.raises(BadInput, match="layer 0: an FFN without a gate"):
        ffn_thresholds(tiny("nemotron", hidden_act="relu"))


def test_exchange_undo_and_redo_on_one_instance() -> None:
    model, other, x = tiny(), tiny(), tokens()
    with torch.no_grad():
        before = model(input_ids=x).logits
        with ExchangedFFNs(model, Doubled) as exchanged:
            assert exchanged.count() == 3
            during = model(input_ids=x).logits
            exchanged.undo()
            assert exchanged.count() == 0
            assert torch.equal(model(input_ids=x).logits, before)
            exchanged.redo()
            assert torch.equal(model(input_ids=x).logits, during)
            assert torch.equal(other(input_ids=x).logits, before)
        assert not torch.equal(during, before)
        assert exchanged.count() == 0
        assert torch.equal(model(input_ids=x).logits, before)


def test_all_or_none() -> None:
    model = tiny()
    modules = [f.module for f in find_ffns(model)]

    def failing(ffn: FFN) -> nn.Module:
        if ffn.layer == 2:
            raise RuntimeError("no room")
        return Doubled(ffn)

    with pytest.raises(RuntimeError, match="no room"):
        ExchangedFFNs(model, failing)
    assert all(f.module is module for f, module in zip(find_ffns(model), modules, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_the_limit_by_hand(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    # q and o [32, 32], k and v [16, 32], three of [53, 32], two norms, and at the end one norm and the output layer
    attention = 2 * 32 * 32 + 2 * 16 * 32
    read = 3 * (attention + 3 * 53 * 32 + 2 * 32) + 32 + 96 * 32
    assert decode_bytes(model, 0.75) == pytest.approx(4 * (read - 0.75 * 3 * 2 * 53 * 32), rel=1e-12)
    assert decode_bytes(model) == 4 * read


def test_a_fork_goes_on_by_itself_and_hands_its_keys_and_values_over() -> None:
    model, x = tiny(), tokens()
    first = GreedyDecoder(model, x[:1], "wall")
    other = first.fork()
    for _ in range(3):
        first.step()
    found = first.keys_and_values()
    assert found is not None
    assert {part.shape[1] for side in found for part in side} == {x.shape[1] + 3}
    assert [len(side) for side in found] == [3, 3], "one a layer"
    for _ in range(3):
        other.step()
    assert other.tokens == first.tokens
    assert torch.equal(other.logits, first.logits)
    first._length += 1  # as of a window that forgets
    assert first.keys_and_values() is None
