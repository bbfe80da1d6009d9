"""Every way to decode, in turns: honest gates, thresholds raised for timing alone, the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import cpu, reference
from kernels.decoder import Decoder
from prosparse_core.families import find_ffns
from prosparse_core.predictor import LayerPredictor
from prosparse_core.substitute import use_thresholds
from tasks.timing.decode import Peers, Way, time_ways
from tasks.timing.thresholds import raised_thresholds

THRESHOLDS = [0.0, 0.02, 0.05]
PROMPTS = [torch.tensor([[5, 9, 40, 11, 3]]), torch.tensor([[7, 7, 80, 3, 21, 60, 31, 12, 44, 50]])]
RAISED = [0.3, 0.3, 0.4]


@pytest.fixture(autouse=True)
def _native() -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)


@pytest.fixture
def model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=53, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    found = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    use_thresholds(found, THRESHOLDS)
    return found


def timed(model: Any, peers: Peers, threads: int = 1, num_new: int = 5) -> dict[tuple[Any, ...], Way]:
    ways = time_ways(model, THRESHOLDS, PROMPTS, peers, num_new=num_new, threads=threads, budget_s=0.0)
    return {(w.provider, w.dtype, w.mask_source, w.cutoff): w for w in ways}


def some_predictors() -> list[LayerPredictor]:
    return [LayerPredictor(32, 53, 7, torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("threads", [1, 2])
def test_all_ways_agree_and_the_model_is_left_alone(model: Any, threads: int) -> None:
    before = [ffn.activation for ffn in find_ffns(model)]
    peers = Peers(RAISED, torch.bfloat16, some_predictors(), "post_norm", [0.5])
    found = timed(model, peers, threads)
    assert {w.problem for w in found.values()} == {None}
    assert len(found) == 2 + 4 * 3 + 1
    for way in found.values():
        assert len(way.seconds) == (4 if way.every == 2 else 8)
        assert way.decoder is None or len(way.live) == len(way.bytes_read) == 8
    dense, exact = (found[f"native_{p}", "float32", "recorded", None] for p in ("dense", "exact"))
    assert dense.live == exact.live
    assert all(a > b for a, b in zip(dense.bytes_read, exact.bytes_read, strict=True))
    raised = found["native_exact", "bfloat16", "raised", None]
    assert sum(raised.live) < 0.85 * sum(found["native_exact", "bfloat16", "recorded", None].live)
    assert [ffn.activation for ffn in find_ffns(model)] == before
    assert [a.threshold for a in before] == THRESHOLDS


def wrong(change: Callable[[Decoder, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, tokens: change(self, right(self, tokens)))


def test_one_wrong_bit_fails_the_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(decoder: Decoder, logits: torch.Tensor) -> torch.Tensor:
        if decoder.ffn == "certified" and decoder.length > 6:
            logits[0] = torch.nextafter(logits[0], torch.tensor(9e9))
        return logits

    wrong(nudge, monkeypatch)
    found = timed(model, Peers())
    assert "not, to the bit" in str(found["native_certified", "float32", "recorded", None].problem)
    assert found["native_exact", "float32", "recorded", None].problem is None
    assert len(found["native_certified", "float32", "recorded", None].seconds) < 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: 1.02 * logits, "without thresholds its logits differ from transformers' by 0.02 relative"),
        (lambda logits: logits.scatter(0, logits.argmax(keepdim=True), -9.0), "without thresholds"),
    ],
)
def test_a_loop_that_is_wrong_throughout_fails_the_gate(
    model: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    wrong(lambda decoder, logits: change(logits), monkeypatch)
    found = timed(model, Peers())
    way = found["native_dense", "float32", "recorded", None]
    assert said in str(way.problem)
    assert way.seconds == []


def test_thresholds_that_are_not_the_model_s_fail_the_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check without thresholds cannot see."""
    make = Decoder.__init__

    def ignore(self: Decoder, packed: Any, **settings: Any) -> None:
        if settings.get("thresholds") is None:
            settings["thresholds"] = [0.0, 0.9, 0.9]
        make(self, packed, **settings)

    monkeypatch.setattr(Decoder, "__init__", ignore)
    found = timed(model, Peers(), num_new=3)
    problem = str(found["native_dense", "float32", "recorded", None].problem)
    assert problem.startswith("its logits differ from transformers' by")


def test_a_flipped_neuron_now_and_then_is_no_failure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(decoder: Decoder, logits: torch.Tensor) -> torch.Tensor:
        return 1.05 * logits if decoder.length == 7 else logits

    wrong(flip, monkeypatch)
    found = timed(model, Peers())
    assert {w.problem for w in found.values()} == {None}
    way = found["native_exact", "float32", "recorded", None]
    assert max(way.errors) == pytest.approx(0.05, abs=1e-3)
    assert way.rel_err is not None
    assert way.rel_err < 1e-5


def test_a_predictor_is_held_against_the_masked_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(lambda decoder, logits: 1.5 * logits if decoder.ffn == "predicted" else logits, monkeypatch)
    found = timed(model, Peers(predictors=some_predictors(), source="pre_norm", cutoffs=[0.4, 0.6]))
    for cutoff in (0.4, 0.6):
        way = found["native_predicted", "float32", "recorded", cutoff]
        assert "masked model by 0.5 relative" in str(way.problem)
        assert way.seconds == []


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_thresholds_are_raised_layer_by_layer_and_none_is_lowered(model: Any, sparsity: float) -> None:
    tokens = torch.randint(96, (1, 60), generator=torch.Generator().manual_seed(0))
    raised = raised_thresholds(model, THRESHOLDS, tokens, sparsity)
    assert all(new >= old for new, old in zip(raised, THRESHOLDS, strict=True))
    use_thresholds(model, raised)
    shares: list[float] = []
    for ffn in find_ffns(model):
        ffn.first.register_forward_hook(
            lambda _, __, out, t=raised[ffn.layer]: shares.append(float(reference.kept(out, t).float().mean()))
        )
    with torch.no_grad():
        model(input_ids=tokens)
    assert len(shares) == 3
    for share, new, old in zip(shares, raised, THRESHOLDS, strict=True):
        assert share <= 1 - sparsity + 1e-3
        assert new == old or share == pytest.approx(1 - sparsity, abs=2e-3)
