"""Sharing a beginning changes no score and no token: against whole passes, and against transformers' own generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.decoding import common_prefix, decode_greedily, read_prefix, score_answers
from tasks.evaluation.scoring import make_scorer, quiet, score_windows, windows
from tests.tasks.held_out_files import CONTEXT, make_model

SHARED = list(range(10, 50))
PROMPTS = [[*SHARED, 7], [*SHARED, 9, 8, 3], [*SHARED, 200, 201, 202, 203, 204, 205, 206], [*SHARED, 7, 7]]
ANSWERS = [[5], [5, 6, 7], [300, 2], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return make_model(tmp_path_factory.mktemp("tiny"))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=70).map(tuple), min_size=1, max_size=5))
def test_the_common_prefix_is_common_and_as_long_as_it_may_be(prompts: list[tuple[int, ...]]) -> None:
    found = common_prefix([(9,) * 40 + p for p in prompts])
    if len(prompts) < 2:
        assert not found
        return
    assert all(((9,) * 40 + p)[: len(found)] == tuple(found) for p in prompts)
    nexts = {p[len(found) - 40] for p in prompts if len(p) > len(found) - 40}
    assert len(nexts) > 1 or any(len(p) == len(found) - 39 for p in prompts), "one more token would not be common"
    assert not common_prefix([p[:20] for p in prompts]), "a short one is not worth it"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_score_as_in_whole_passes(tiny: tuple[Any, Any], prompt: list[int], shared: bool) -> None:
    model, _ = tiny
    prefix = read_prefix(model, SHARED if shared else [], "fp32")
    whole = [windows(prompt, answer, CONTEXT) for answer in ANSWERS]
    assert all(len(found) == 1 for found in whole)
    expected = score_windows(model, [found[0] for found in whole], "fp32")
    for _ in range(2):  # a prefix serves more than once
        ours = score_answers(model, prompt, ANSWERS, "fp32", prefix)
        assert [s for s, _ in ours] == pytest.approx([s for s, _ in expected], rel=1e-5)
        assert [g for _, g in ours] == [g for _, g in expected]


def test_the_greedy_answer_is_told(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    (best,) = decode_greedily(model, [PROMPTS[1]], "fp32", max_new=4, is_finished=lambda ids: False)
    wrong = [*best[:-1], (best[-1] + 1) % 400]
    found = score_answers(model, PROMPTS[1], [best, wrong, best[:1]], "fp32")
    assert [is_greedy for _, is_greedy in found] == [True, False, True]


@pytest.mark.parametrize("shared", [False, True])
def test_decoding_is_that_of_transformers(tiny: tuple[Any, Any], shared: bool) -> None:
    model, _ = tiny
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    prefix = read_prefix(model, SHARED if shared else [], "fp32")
    ours = decode_greedily(model, PROMPTS, "fp32", max_new=12, is_finished=lambda ids: False, prefix=prefix)
    assert ours == expected
    # A row that is done leaves the others as they were.
    ends = {tuple(row[: 2 + 3 * i]) for i, row in enumerate(expected)}
    cut = decode_greedily(model, PROMPTS, "fp32", max_new=12, is_finished=lambda ids: tuple(ids) in ends, prefix=prefix)
    assert cut == [row[: 2 + 3 * i] for i, row in enumerate(expected)]


class Request:
    """What the harness hands to its model."""

    def __init__(self, prompt: str, settings: dict[str, Any]) -> None:
        self.args = (prompt, settings)


def generated(tiny: tuple[Any, Any], prompts: list[str], until: list[str], max_new: int = 20, **how: Any) -> list[str]:
    model, tokenizer = tiny
    settings = {"until": until, "max_gen_toks": max_new, "do_sample": False, **how}
    with quiet():
        scorer = make_scorer(model, tokenizer, precision="fp32", batch_size=2, max_length=CONTEXT)
    return scorer.generate_until([Request(p, settings) for p in prompts])


def test_texts_end_before_their_stop(tiny: tuple[Any, Any]) -> None:
    prompts = ["def f(x):", "class Stack:\n    def push", "a"]
    whole = generated(tiny, prompts, [])
    assert all(whole)
    stops = [text[3:5] for text in whole]
    cut = generated(tiny, prompts, stops)
    for text, full in zip(cut, whole, strict=True):
        assert full.startswith(text)
        assert not any(stop in text for stop in stops)
        assert text == full[: min(full.find(stop) for stop in stops if stop in full)]


def test_progress_is_told_within_a_batch(tiny: tuple[Any, Any]) -> None:
    """Token by token: a batch can take minutes."""
    model, tokenizer = tiny
    with quiet():
        scorer = make_scorer(model, tokenizer, precision="fp32", batch_size=2, max_length=CONTEXT)
    shares: list[float] = []
    scorer.on_progress = shares.append
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    scorer.generate_until([Request(p, settings) for p in ("a", "b", "c")])
    assert shares == sorted(shares)
    assert {2 / 3 * k / 4 for k in (1, 2, 3)} < set(shares)
    assert shares[-1] == 1


def test_a_prompt_has_one_separator_and_loses_its_beginning_when_too_long(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    seen: list[list[int]] = []
    heads = [tokenizer.eos_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    monkeypatch.setattr(
        "tasks.evaluation.scoring.decode_greedily",
        lambda model, prompts, *a, **k: seen.extend(prompts) or [[tokenizer.eos_token_id] for _ in prompts],
    )
    with quiet():
        scorer = make_scorer(model, tokenizer, precision="fp32", batch_size=1, max_length=CONTEXT)
    settings = {"until": ["\n"], "max_gen_toks": 16}
    long = " ".join(map(str, range(90)))
    texts = scorer.generate_until([Request(t, settings) for t in (long, "<|im_end|>x", "<|im_start|>y", "")])
    assert texts == [""] * 4
    assert sorted(p[0] for p in seen) == sorted(heads), "what is written out is not doubled"
    assert [p.count(0) + p.count(1) for p in seen] == [1] * 4
    assert len(seen[0]) == CONTEXT - 16
    assert seen[0][1:] == tokenizer(long, add_special_tokens=False)["input_ids"][-(CONTEXT - 17) :]
    assert scorer.num_truncated == 1


def test_the_model_s_own_generation_settings_are_not_asked(tmp_path: Path) -> None:
    model, tokenizer = make_model(tmp_path)
    before = generated((model, tokenizer), ["x = "], [])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert generated((model, tokenizer), ["x = "], []) == before
