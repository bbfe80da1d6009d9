"""Held-out files are refused before a model is loaded; ratios and their standard errors are what they claim."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core.errors import BadInput
from tasks.evaluation.held_out import DENOMINATORS, corpus_scores, ratio_score, read_held_out
from tests.tasks.held_out_files import write_held_out

counts = st.integers(1, 200)
losses = st.floats(0.1, 8)


def test_all_corpora_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    found = read_held_out(write_held_out(tmp_path))
    assert list(found.corpora) == ["code", "docs", "chat"]
    assert found.seq_len == 64
    assert found.corpora["docs"][1]["text"] == "Ünïcode and 汉字 are text, too.\n"
    assert found.corpora["code"][0]["prompt"] is None
    assert found.corpora["chat"][0]["prompt"] == "Write the function `f`."
    assert found.choices is not None
    assert [q["answer"] for q in found.choices] == [0, 1, 2]
    assert list(read_held_out(tmp_path, ["chat", "code"]).corpora) == ["chat", "code"]
    assert read_held_out(tmp_path, choice=False).choices is None


def test_without_a_file_of_questions_there_are_none(tmp_path: Path) -> None:
    assert read_held_out(write_held_out(tmp_path, choices=False)).choices == []


def test_sizes_follow_the_limit(tmp_path: Path) -> None:
    found = read_held_out(write_held_out(tmp_path))
    assert len(found.sizes(None)) == 4
    assert found.sizes(1)[1] == len("A list is a sequence.\n")
    assert found.sizes(1)[2] == len("Write the function `f`." + "def f(x):\n    return x\n")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("manifest.json", None, "no manifest.json to read"),
        ("manifest.json", "[]", "is not the manifest of a mixture"),
        ("manifest.json", '{"seq_len": 4, "corpora": []}', "no corpus to evaluate on"),
        ("evaluation/code.jsonl", None, "code.jsonl: .*No such file"),
        ("evaluation/code.jsonl", "\n\n", "code.jsonl is empty"),
        ("evaluation/code.jsonl", '{"id": 1, "text": "x"}\n{"id":', "code.jsonl, line 2: "),
        ("evaluation/code.jsonl", '{"id": 1}', "code.jsonl, line 1: 'text' is missing"),
        ("evaluation/code.jsonl", '{"id": 1, "text": ""}', "line 1: text must be a string that is not empty, not ''"),
        ("evaluation/code.jsonl", '{"id": 1, "text": "x", "prompt": 3}', "line 1: prompt must be a string, not 3"),
        ("evaluation/code.jsonl", '["x"]', "code.jsonl, line 1: "),
        ("evaluation/code.jsonl", b"\xff\xfe", "code.jsonl: .*decode"),
        ("evaluation/choices.jsonl", '{"id": 1, "question": "q", "choices": ["a"], "answer": 0}', "two or more"),
        ("evaluation/choices.jsonl", '{"id": 1, "question": " ", "choices": ["a", "b"], "answer": 0}', "question must"),
        ("evaluation/choices.jsonl", '{"id": 1, "question": "q", "choices": ["a", " "], "answer": 0}', "not empty"),
        ("evaluation/choices.jsonl", '{"id": 1, "question": "q", "choices": ["a", "b"], "answer": 2}', "answer=2"),
        ("evaluation/choices.jsonl", '{"id": 1, "question": "q", "choices": ["a", "b"], "answer": true}', "=True is"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, file: str, text: str | bytes | None, said: str) -> None:
    path = write_held_out(tmp_path) / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=said):
        read_held_out(tmp_path)


def test_an_unknown_corpus_gets_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown corpus 'coda'") as caught:
        read_held_out(write_held_out(tmp_path), ["docs", "coda"])
    assert caught.value.hint == "did you mean 'code'?"
    with pytest.raises(BadInput, match="no corpus to evaluate on"):
        read_held_out(tmp_path, [])


def test_ratio_by_hand() -> None:
    items = [(-10.0, 5), (-40.0, 20), (-30.0, 15)]
    assert ratio_score("token_perplexity", items) == (pytest.approx(math.exp(2)), pytest.approx(0, abs=1e-12))
    items = [(-10.0, 10), (-30.0, 10)]  # r = 2; residuals -10 and 10; Var = 2/1 * 200 / 400
    assert ratio_score("token_perplexity", items) == (pytest.approx(math.exp(2)), pytest.approx(math.exp(2)))
    assert ratio_score("bits_per_byte", items) == (pytest.approx(2 / math.log(2)), pytest.approx(1 / math.log(2)))


@given(st.lists(st.tuples(losses, counts), min_size=2, max_size=30))
def test_ratio_pools_documents_and_ignores_their_order(documents: list[tuple[float, int]]) -> None:
    items = [(-loss * count, count) for loss, count in documents]
    value, stderr = ratio_score("token_perplexity", items)
    mean = sum(loss * count for loss, count in documents) / sum(count for _, count in documents)
    assert value == pytest.approx(math.exp(mean), rel=1e-9)
    assert stderr is not None
    assert stderr >= 0
    turned = ratio_score("token_perplexity", items[::-1])
    assert turned == (pytest.approx(value, rel=1e-12), pytest.approx(stderr, rel=1e-9, abs=1e-12))


def test_the_standard_error_is_that_of_resampled_documents() -> None:
    draw = random.Random(5)
    items = []
    for _ in range(200):
        count = draw.randint(20, 400)
        items.append((-count * draw.gauss(2.0, 0.4), count))
    _, stderr = ratio_score("token_perplexity", items)
    values = [ratio_score("token_perplexity", draw.choices(items, k=len(items)))[0] for _ in range(2000)]
    mean = sum(values) / len(values)
    resampled = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert stderr == pytest.approx(resampled, rel=0.08)


def test_one_document_has_no_standard_error_and_a_huge_value_is_not_a_number() -> None:
    assert ratio_score("byte_perplexity", [(-3.0, 3)]) == (pytest.approx(math.e), None)
    sample = dict.fromkeys(DENOMINATORS, (-2000.0, 1))
    scores = {s.metric: s for s in corpus_scores("code", [sample, sample], "d", partial=False, note="why")}
    assert scores["word_perplexity"].value is None
    assert scores["word_perplexity"].note == "beyond the range of a double; why"
    assert scores["bits_per_byte"].value == pytest.approx(2000 / math.log(2))
    assert json.dumps([s.value for s in scores.values()], allow_nan=False)
