"""Windows, padding, prefixes: what goes through the model is what the harness means, and nothing else is counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prosparse_core.data.packing import Encoder
from prosparse_core.data.sources import Document
from prosparse_core.errors import ProSparseError
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import use_relu
from tasks.evaluation.held_out import choices_task, corpus_task
from tasks.evaluation.scoring import Window, evaluating, load_task, make_scorer, quiet, run_task, score_windows, windows
from tests.tasks.held_out_files import CONTEXT, QUESTIONS, TEXTS, make_model


class Request:
    """What the harness hands to its model."""

    def __init__(self, *args: str) -> None:
        self.args = args
        self.task_name = "test"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return make_model(tmp_path_factory.mktemp("tiny"))


def scorer_of(model: Any, tokenizer: Any) -> Any:
    with quiet():
        return make_scorer(model, tokenizer, precision="fp32", batch_size=4, max_length=CONTEXT)


@given(st.integers(1, 30), st.integers(0, 90), st.integers(2, 20))
def test_windows_score_every_token_once_with_as_much_context_as_fits(before: int, after: int, max_length: int) -> None:
    context, continuation = list(range(before)), list(range(before, before + after))
    found = windows(context, continuation, max_length)
    assert [t for w in found for t in w.targets] == continuation
    for window in found:
        assert 1 <= len(window.targets) <= len(window.inputs) <= max_length
        assert window.inputs[-1] == window.targets[-1] - 1, "the last input stands right before the last target"
        assert window.inputs == list(range(window.inputs[0], window.inputs[-1] + 1))
        assert window.inputs[0] == 0 or len(window.inputs) == max_length, "no context is thrown away without need"
    if before + after <= max_length + 1 and after:
        assert found == [Window([*context, *continuation][:-1], continuation)]


@settings(deadline=None)  # importing the harness takes a while
@given(st.integers(1, 100), st.integers(2, 20))
def test_windows_of_a_text_are_the_harness_s_rolling_windows(num_tokens: int, max_length: int) -> None:
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(1, num_tokens + 1))
    theirs = get_rolling_token_windows(token_list=tokens, prefix_token=0, max_seq_len=max_length, context_len=1)
    assert [(w.inputs, w.targets) for w in windows([0], tokens, max_length)] == list(theirs)


def test_rolling_loglikelihood_equals_the_stock_harness_model(tiny: tuple[Any, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    requests = [Request(text) for texts in TEXTS.values() for text in texts]
    with quiet():
        stock = HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=1, max_length=CONTEXT, prefix_token_id=1)
        theirs = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    ours = scorer_of(*tiny).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(len(tiny[1](r.args[0])["input_ids"]) for r in requests) > 2 * CONTEXT, "one text rolls over windows"


def test_choices_equal_the_stock_harness_model(tiny: tuple[Any, Any]) -> None:
    """Its contexts begin with the separator when the text itself does."""
    from lm_eval.models.huggingface import HFLM

    pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]
    with quiet():
        stock = HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=1, max_length=CONTEXT)
        theirs = stock.loglikelihood([Request(f"<|im_end|>{q}", c) for q, c in pairs], disable_tqdm=True)
    ours = scorer_of(*tiny).loglikelihood([Request(q, c) for q, c in pairs])
    assert [x[0] for x in ours] == pytest.approx([x[0] for x in theirs], rel=1e-5)
    assert [x[1] for x in ours] == [x[1] for x in theirs]


def test_greedy_is_true_only_when_every_token_is_the_likeliest(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    tokens = [5, 9, 17]
    for _ in range(6):
        with torch.inference_mode():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    right = Window(tokens[:-1], tokens[3:])
    wrong = Window(tokens[:-1], [*tokens[3:-1], (tokens[-1] + 1) % 400])
    assert [is_greedy for _, is_greedy in score_windows(model, [right, wrong], "fp32")] == [True, False]


def test_padding_neither_moves_a_score_nor_is_counted(tmp_path: Path) -> None:
    model, _ = make_model(tmp_path)
    use_relu(model)
    batch = [Window(list(range(7, 7 + n)), [3] * min(n, 4)) for n in (50, 3, 21, 1)]
    with SparsityMeter(model) as meter:
        together = score_windows(model, batch, "fp32", meter)
        counted = meter.layers()
        meter.reset()
        alone = [score_windows(model, [window], "fp32", meter)[0] for window in batch]
        expected = meter.layers()
        meter.reset()
        score_windows(model, batch, "fp32")
        meter.mask = None
        score_windows(model, batch, "fp32")
        padded = meter.layers()
    assert [s for s, _ in together] == pytest.approx([s for s, _ in alone], rel=1e-5)
    for ours, twin, wrong in zip(counted, expected, padded, strict=True):
        assert ours.num_tokens == twin.num_tokens == 50 + 3 + 21 + 1
        assert ours.sparsity == pytest.approx(twin.sparsity, abs=2e-4)
        assert ours.mean_abs_x1 == pytest.approx(twin.mean_abs_x1, rel=1e-4)
        assert ours.dead_frac == twin.dead_frac
        assert abs(wrong.mean_abs_x1 - twin.mean_abs_x1) > 1e-3 * twin.mean_abs_x1, "counting padding would show"


@pytest.mark.parametrize("kind", ["plain", "adds-bos", "no-bos", "no-eos", "no-pad"])
def test_every_sequence_begins_with_the_prefix_once(tmp_path: Path, kind: str) -> None:
    model, tokenizer = make_model(tmp_path)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if kind == "adds-bos":
        from tokenizers.processors import TemplateProcessing

        single = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
        tokenizer.backend_tokenizer.post_processor = single
        assert tokenizer("x")["input_ids"][0] == bos
    elif kind == "no-bos":
        tokenizer.bos_token = None
    elif kind == "no-eos":
        tokenizer.eos_token = tokenizer.pad_token = None
    elif kind == "no-pad":
        tokenizer.pad_token = None
    pad = tokenizer.pad_token
    scorer = scorer_of(model, tokenizer)
    seen: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    text = "value = 1\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    scorer.loglikelihood_rolling([Request(text)])
    scorer.loglikelihood([Request(text, "print(value)")])
    scorer.loglikelihood([Request("<|im_start|>" + text, "print(value)")])
    scorer.loglikelihood([Request(scorer.prefix + text, "print(value)")])
    handle.remove()
    rolling, pair, begun, written = seen
    (encoded,) = Encoder(tokenizer).encode([Document("d", "d", text)])
    before = int(encoded.tokens[0]) if kind in ("adds-bos", "no-eos") else int(encoded.tokens[-1])
    assert before == (bos if kind in ("adds-bos", "no-eos") else eos), "what precedes the next document in training"
    assert rolling == [before, *ids[:-1]]
    assert pair[:3] == written[:3] == [before, *ids[:2]], "what is written out is not doubled"
    assert scorer.prefix == tokenizer.convert_ids_to_tokens(before)
    assert scorer.prefix_kind == ("BOS" if before == bos else "between documents, in training as here")
    if kind != "no-bos":
        assert begun[:3] == [bos, *ids[:2]], "a chat's beginning stays as it is"
    assert tokenizer.pad_token == pad, "the caller's tokenizer stays as it is"


def test_a_prompt_ends_as_written_and_a_question_as_the_harness_ends_it(tiny: tuple[Any, Any]) -> None:
    scorer = scorer_of(*tiny)
    encode = scorer.tok_encode
    assert encode("a:\n") + encode("    return") != encode("a:\n    return"), "the line break merges with the indent"
    scorer.ends_prompt_as_written = True
    assert scorer._encode_pair("a:\n", "    return") == (encode("a:\n"), encode("    return")), "chats begin themselves"
    assert scorer._encode_pair("a:\n", "b = 2") == (encode("a:\n"), encode("b = 2"))
    scorer.ends_prompt_as_written = False
    context, answer = scorer._encode_pair("a:\n", "    return")
    assert context == [tiny[1].eos_token_id, *encode("a:")]
    assert encode("a:") + answer == encode("a:\n    return")


def test_harness_tasks_need_no_network_and_no_cache_folder(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import socket

    import datasets.config

    def refuse(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scorer = scorer_of(*tiny)
    rows = [{"text": text} for text in TEXTS["code"]]
    questions = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    with quiet():
        capfd.readouterr()
        raw: dict[str, Any] = {}
        run_task(scorer, load_task(corpus_task("code", rows, [None] * 3, scorer.num_scored)), None, raw)
        run_task(scorer, load_task(choices_task(questions)), 2, raw)
    assert capfd.readouterr() == ("", ""), "no bars, no remarks"
    assert not (tmp_path / "cache").exists()
    assert raw["n-samples"]["code"] == {"original": 3, "effective": 3}
    assert raw["n-samples"]["code-choices"] == {"original": 3, "effective": 2}
    assert "samples" not in raw


def test_quiet_and_evaluating_leave_no_trace(tiny: tuple[Any, Any]) -> None:
    import lm_eval.api.task

    bar, level = lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level
    model = tiny[0]
    model.train()

    def fail_inside() -> None:
        with quiet(), evaluating(model):
            assert not model.training
            assert list(lm_eval.api.task.tqdm([1, 2], total=2)) == [1, 2]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert lm_eval.api.task.tqdm is bar
    assert logging.getLogger("lm_eval").level == level
    assert model.training
    model.eval()


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model, tokenizer = make_model(tmp_path)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ProSparseError, match="not finite"):
        scorer_of(model, tokenizer).loglikelihood_rolling([Request("x = 1")])
