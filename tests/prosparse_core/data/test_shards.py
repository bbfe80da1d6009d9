from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_corpora import SEQ_LEN, data_of, digests, files, notes
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data.packing import Encoder
from prosparse_core.data.sources import split_of
from prosparse_core.errors import BadInput
from prosparse_core.mixing import Mixture, prepare


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    data = data_of(files("notes", notes(tmp_path / "notes"), max_tokens=5000))
    runs = {}
    for name, seed in [("a", 1), ("b", 1), ("d", 2)]:
        prepare(data, tiny_tokenizer(), tmp_path / name, seed=seed)
        runs[name] = digests(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"]["train/notes.tokens.npy"] != runs["d"]["train/notes.tokens.npy"]


@pytest.mark.parametrize("options", [{"bos": False}, {"eos": False}, {"adds_bos": True}, {"chat": CHAT}])
def test_every_tokenizer_that_can_separate_documents_works(tmp_path: Path, options: dict[str, Any]) -> None:
    lines = [json.dumps({"q": f"What is {i}?", "a": f"It is the number {i}."}) for i in range(400)]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chat = files("qa", tmp_path / "qa.jsonl", prompt="{q}", answer="{a}")
    data = data_of(files("notes", notes(tmp_path / "notes")), chat)
    tokenizer = tiny_tokenizer(**options)
    prepare(data, tokenizer, tmp_path / "out", seed=0)
    batch = Mixture(tmp_path / "out", 0).batch(1, 64)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    texts = batch.tokens[[c == 0 for c in batch.corpora]]
    assert (texts == end).any()
    answers = batch.labels[[c == 1 for c in batch.corpora]]
    assert "It is the number" in tokenizer.decode(answers[0][answers[0] != -100])
    assert "What is" not in tokenizer.decode(answers[answers != -100])


def test_a_training_text_that_is_also_held_out_is_removed(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    names = sorted(path.name for path in folder.iterdir())
    first = prepare(data_of(files("notes", folder)), tiny_tokenizer(), tmp_path / "first", seed=0)
    held = Mixture(tmp_path / "first", 0).held_out("evaluation", "notes")[0].file
    trained = [name for name in names if split_of(name) == "train"][:2]
    text = (folder / held).read_text(encoding="utf-8")
    for name in trained:
        (folder / name).write_text(f"  {text}\n", encoding="utf-8")
    # in another corpus too, under a name of its own
    other = tmp_path / "other"
    other.mkdir()
    for name in names:
        (other / name).write_text((folder / name).read_text(encoding="utf-8").upper(), encoding="utf-8")
    (other / "a-copy.txt").write_text(text, encoding="utf-8")
    assert split_of("a-copy.txt") == "train"
    manifest = prepare(
        data_of(files("notes", folder), files("other", other)),
        tiny_tokenizer(),
        tmp_path / "out",
        seed=0,
    )
    train = [entry["train"] for entry in manifest["corpora"]]
    assert first["corpora"][0]["train"]["duplicates_of_held_out_removed"] == 0
    assert train[0]["duplicates_of_held_out_removed"] == 2
    assert train[1]["duplicates_of_held_out_removed"] == 1 + 2  # of what it holds out itself, too
    for corpus in ("notes", "other"):
        tokens = np.load(tmp_path / "out" / "train" / f"{corpus}.tokens.npy")
        assert text.strip() not in tiny_tokenizer().decode(tokens.ravel())


def test_as_many_files_are_held_out_as_their_tokens_need_and_all_others_are_trained_on(tmp_path: Path) -> None:
    """A quarter of the text of before: 16 % of 600 files were held out whatever was asked."""
    folder = notes(tmp_path / "notes", 600)
    data = data_of(files("notes", folder, max_tokens=10_000_000), calibration_tokens=512, evaluation_tokens=1024)
    manifest = prepare(data, tiny_tokenizer(), tmp_path / "out", seed=0)
    mixture = Mixture(tmp_path / "out", 0)
    drawn = {split: {d.file for d in mixture.held_out(split, "notes")} for split in ("calibration", "evaluation")}
    said = json.loads((tmp_path / "out" / "held_out.json").read_text())
    assert {split: set(names) for split, names in said["files"].items()} == drawn
    about, entry = manifest["held_out"], manifest["corpora"][0]
    assert about["files"] == {split: len(names) for split, names in drawn.items()}
    assert about["documents"] == sum(about["files"].values()) == entry["train"]["held_out_left_out"]
    assert 512 + 1024 <= about["tokens"] == sum(entry[split]["tokens"] for split in drawn)
    assert about["documents"] < 0.05 * 600, "not 16 %"
    assert entry["train"]["documents"] == 600 - about["documents"]
    other = prepare(data, tiny_tokenizer(), tmp_path / "other", seed=5)
    assert other["held_out"] == about
    assert json.loads((tmp_path / "other" / "held_out.json").read_text()) == said, "every seed holds out the same"


def test_a_file_that_one_corpus_holds_out_is_trained_on_in_none(tmp_path: Path) -> None:
    """Two corpora of different texts of the same files, of which the second asks for the same tokens of fewer files."""
    one, two = notes(tmp_path / "one", 300), tmp_path / "two"
    two.mkdir()
    for path in one.iterdir():
        (two / path.name).write_text(path.read_text(encoding="utf-8").upper() * 3, encoding="utf-8")
    data = data_of(files("one", one), files("two", two), calibration_tokens=512, evaluation_tokens=512)
    manifest = prepare(data, tiny_tokenizer(), tmp_path / "out", seed=0)
    names = json.loads((tmp_path / "out" / "held_out.json").read_text())["files"]
    drawn = [name for found in names.values() for name in found]
    assert len(drawn) == len(set(drawn))
    for entry, folder in zip(manifest["corpora"], (one, two), strict=True):
        tokens = np.load(tmp_path / "out" / "train" / f"{entry['name']}.tokens.npy").ravel()
        text = tiny_tokenizer().decode(tokens)
        assert entry["train"]["held_out_left_out"] == len(drawn)
        for name in drawn:
            assert (folder / name).read_text(encoding="utf-8").splitlines()[1] not in text


def test_too_little_held_out_text(tmp_path: Path) -> None:
    source = files("notes", notes(tmp_path / "notes"))
    for split in ("calibration", "evaluation"):
        with pytest.raises(BadInput, match=rf"'notes' has \d+ held-out tokens for {split}, 90000 asked") as error:
            prepare(
                data_of(source, **{f"{split}_tokens": 90_000}),
                tiny_tokenizer(),
                tmp_path / split,
                seed=0,
            )
        assert error.value.hint is not None
        assert f"lower data.{split}_tokens" in error.value.hint


def test_one_text_file_cannot_be_trained_on_and_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A long story. " * 3000, encoding="utf-8")
    with pytest.raises(BadInput, match="has 0 held-out tokens") as error:
        prepare(data_of(files("book", tmp_path / "book.txt")), tiny_tokenizer(), tmp_path / "o", seed=0)
    assert "one is not enough" in str(error.value.hint)


def test_less_than_one_window_for_calibration_is_no_mixture_at_all(tmp_path: Path) -> None:
    message = r"data.calibration_tokens=63 is less than one window \(data.seq_len=64\)"
    with pytest.raises(ValidationError, match=message):
        data_of(files("notes", notes(tmp_path / "notes")), calibration_tokens=SEQ_LEN - 1)


def test_less_than_one_window_of_training_text(tmp_path: Path) -> None:
    source = files("notes", notes(tmp_path / "notes"), max_tokens=SEQ_LEN - 1)
    with pytest.raises(BadInput, match=r"fewer training tokens than one window of seq_len=64 \(max_tokens=63\)"):
        prepare(data_of(source), tiny_tokenizer(), tmp_path / "out", seed=0)


def test_an_empty_corpus_and_a_wrong_column_are_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": null}\n', encoding="utf-8")
    good = files("notes", notes(tmp_path / "notes"))
    for column, message in (("text", "'bad' has no text"), ("body", "no column 'body'")):
        bad = files("bad", tmp_path / "empty.jsonl", column=column)
        with pytest.raises(BadInput, match=message):
            prepare(data_of(good, bad), tiny_tokenizer(), tmp_path / "out", seed=0)
    with pytest.raises(BadInput, match="neither a BOS nor an EOS"):
        prepare(data_of(good), tiny_tokenizer(bos=False, eos=False), tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_max_tokens_is_a_limit_and_all_the_text_is_used_below_it(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    few = prepare(data_of(files("n", folder, max_tokens=700)), tiny_tokenizer(), tmp_path / "a", seed=0)
    everything = prepare(data_of(files("n", folder)), tiny_tokenizer(), tmp_path / "b", seed=0)
    assert few["corpora"][0]["train"]["windows"] == 700 // SEQ_LEN
    train = everything["corpora"][0]["train"]
    assert train["documents"] == 60 - everything["held_out"]["documents"]
    encoder = Encoder(tiny_tokenizer())
    assert train["windows"] < 400_000 // SEQ_LEN
    assert len(encoder.prefix) == 0
    assert np.array_equal(np.load(tmp_path / "a/train/n.tokens.npy"), np.load(tmp_path / "b/train/n.tokens.npy")[:10])
