"""Vocabularies as the format spells them, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from powerinfer_parts import tokenizer_json

from prosparse_core.errors import BadInput
from prosparse_core.formats.powerinfer_tokenizer import read_vocabulary
from prosparse_core.random_model import train_tokenizer

IDS = {"bos_token_id": 0, "eos_token_id": [1, 2]}


def read(folder: Path, content: Any, rows: int = 12) -> Any:
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_vocabulary(folder, rows, IDS)


def test_byte_level_bpe(tmp_path: Path) -> None:
    content = tokenizer_json(10)
    content["added_tokens"].append({"id": 9, "content": "user", "special": False})
    found = read(tmp_path, content)
    assert found.kind == "gpt2"
    assert found.tokens[:8] == ("<s>", "</s>", "a", "b", "c", "Ġ", "ab", "Ġa")
    assert found.tokens[9:] == ("user", "[PAD10]", "[PAD11]"), "rows without a token are unused"
    assert found.types == (3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 5, 5)
    assert found.merges == ("a b", "Ġ a")
    assert (found.bos, found.eos) == (0, 1), "the first of several"
    assert len(found.notes) == 1
    assert "besides" not in found.notes[0]


def test_other_splitting_is_named(tmp_path: Path) -> None:
    content = tokenizer_json(10)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, content["pre_tokenizer"]]}
    assert "this tokenizer splits by Digits besides" in read(tmp_path, content).notes[0]


def test_sentencepiece_bpe_merges_in_the_order_of_its_scores(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "▁", "ab", "▁a", "▁ab"]
    model = {
        "vocab": {t: i for i, t in enumerate(pieces)},
        "merges": ["a b", "▁ a", "▁a b", "▁ ab"],
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    special = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    found = read(tmp_path, {"model": model, "added_tokens": special, "pre_tokenizer": None}, rows=11)
    assert found.kind == "llama"
    assert found.merges == ()
    assert found.types == (2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 5)
    assert found.scores[7:10] == (0.0, -1.0, -2.0), "a piece that two merges make has the score of the earlier one"
    assert found.notes == ()


def test_a_real_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(320)
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, len(tokenizer), {"bos_token_id": 0, "eos_token_id": None})
    assert list(found.tokens) == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found.eos is None
    assert len(found.merges) == len(tokenizer) - 2 - 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as a BPE tokenizer"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "not readable as a BPE tokenizer"),
        ({**tokenizer_json(10), "pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level BPE nor BPE with byte"),
        (tokenizer_json(13), r"has id 12, but the embedding has 12 rows"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(tmp_path, content)
