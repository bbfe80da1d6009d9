from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import SEED, SEQ_LEN, data_of, digests, files, notes, real_data
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data.packing import Encoder
from prosparse_core.data.sources import split_of
from prosparse_core.errors import BadInput
from prosparse_core.mixing import Mixture, prepare
from prosparse_core.recipe_mixture import BLOCK, block_counts
from prosparse_core.recipe_train import Stage
from prosparse_core.shares import permutation


class Watcher:
    def __init__(self) -> None:
        self.updates: list[tuple[float, float, dict[str, Any]]] = []
        self.notes: list[str] = []

    def update(self, done: float, total: float, **fields: Any) -> None:
        self.updates.append((done, total, fields))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, watcher: Watcher) -> Path:
    """The three real corpora and one of weight 0, prepared with a chat tokenizer."""
    base = tmp_path_factory.mktemp("mixture")
    data = real_data(notes(base / "notes", 400))
    manifest = prepare(data, tiny_tokenizer(chat=CHAT), base / "out", seed=SEED, progress=watcher)
    assert manifest == json.loads((base / "out" / "manifest.json").read_text())
    return base / "out"


@pytest.fixture(scope="module")
def mixture(prepared: Path) -> Mixture:
    return Mixture(prepared, SEED)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# what is written


def test_the_folder_has_what_the_layout_says(prepared: Path) -> None:
    text, chat = ("python-code", "package-docs"), "code-instructions"
    assert {p.relative_to(prepared).as_posix() for p in prepared.rglob("*") if p.is_file()} == {
        "manifest.json",
        "held_out.json",
        "evaluation/choices.jsonl",
        *(f"train/{name}.{kind}.npy" for name in (*text, chat) for kind in ("tokens", "begins")),
        f"train/{chat}.mask.npy",
        *(f"calibration/{name}.{kind}.npy" for name in (*text, chat, "notes") for kind in ("tokens", "begins")),
        f"calibration/{chat}.mask.npy",
        *(f"{split}/{name}.jsonl" for split in ("calibration", "evaluation") for name in (*text, chat, "notes")),
    }
    for path in prepared.rglob("*.tokens.npy"):
        array = np.load(path, mmap_mode="r")
        assert array.dtype == np.int32
        assert array.shape[1] == SEQ_LEN


def test_the_manifest_counts_what_is_on_disk(prepared: Path, mixture: Mixture) -> None:
    manifest = mixture.manifest
    assert manifest["choice_questions"] == len(rows(prepared / "evaluation" / "choices.jsonl")) == 12
    tokenizer = tiny_tokenizer(chat=CHAT)
    assert manifest["tokenizer"]["eos_token_id"] == tokenizer.eos_token_id
    assert manifest["tokenizer"]["document_suffix"] == [tokenizer.eos_token_id]
    for entry in manifest["corpora"]:
        name = entry["name"]
        for split in ("calibration", "evaluation"):
            found = rows(prepared / split / f"{name}.jsonl")
            assert entry[split]["documents"] == len({row["id"] for row in found})
            assert entry[split]["spans"] == len(found)
            assert entry[split]["files"] == len({row["file"] for row in found})
        for split in ("train", "calibration"):
            if entry[split]["windows"]:
                tokens = np.load(prepared / split / f"{name}.tokens.npy")
                assert entry[split]["windows"] * SEQ_LEN == entry[split]["tokens"] == tokens.size
        if name == "code-instructions":
            mask = np.load(prepared / "train" / f"{name}.mask.npy")
            assert entry["train"]["label_share"] == mask.mean()
            assert 0.2 < mask.mean() < 0.95
        elif name != "notes":
            assert entry["train"]["label_share"] == 1.0
        assert entry["evaluation"]["tokens"] >= 4096
        assert entry["calibration"]["tokens"] >= 4096
    notes_entry = manifest["corpora"][3]
    assert (notes_entry["trained"], notes_entry["train"]["windows"], notes_entry["share"]) == (False, 0, 0)


def test_progress_rises_to_the_end(prepared: Path, watcher: Watcher) -> None:
    done = [update[0] for update in watcher.updates]
    assert done == sorted(done)
    assert {update[1] for update in watcher.updates} == {65_000}
    assert done[-1] == 65_000
    assert {update[2].get("corpus") for update in watcher.updates} == {
        "python-code", "package-docs", "code-instructions", None,
    }  # fmt: skip


def test_no_file_is_in_two_splits(prepared: Path, mixture: Mixture) -> None:
    for corpus in mixture.corpora:
        found = {split: {d.file for d in mixture.held_out(split, corpus)} for split in ("calibration", "evaluation")}
        assert not found["calibration"] & found["evaluation"]
        for split, names in found.items():
            assert names
            assert {split_of(name) for name in names} == {split}
    for question in rows(prepared / "evaluation" / "choices.jsonl"):
        assert split_of(question["file"]) == "evaluation"


def test_no_held_out_text_is_trained_on(prepared: Path, mixture: Mixture) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    trained = ""
    for corpus in mixture.corpora[:3]:
        tokens = np.load(prepared / "train" / f"{corpus}.tokens.npy")
        trained += " ".join(tokenizer.decode(tokens.ravel()).split())
    assert len(trained) > 100_000
    for corpus in mixture.corpora:
        for split in ("calibration", "evaluation"):
            for document in mixture.held_out(split, corpus):
                text = " ".join(document.text.split())
                assert len(text) < 60 or text not in trained
    # the search itself finds what is there
    assert " ".join(tokenizer.decode(np.load(prepared / "train" / "python-code.tokens.npy")[5]).split()) in trained


def test_held_out_documents_become_the_tokens_that_were_counted(prepared: Path, mixture: Mixture) -> None:
    encoder = Encoder(tiny_tokenizer(chat=CHAT))
    for corpus in mixture.corpora:
        for split in ("calibration", "evaluation"):
            documents = mixture.held_out(split, corpus)
            counted = [row["num_tokens"] for row in rows(prepared / split / f"{corpus}.jsonl")]
            assert [len(e.tokens) for e in encoder.encode(documents)] == counted
            assert max(counted) <= (512 if corpus == "code-instructions" else SEQ_LEN)
            assert len({d.file for d in documents}) > 2


def test_calibration_windows_are_the_held_out_text(mixture: Mixture) -> None:
    encoder = Encoder(tiny_tokenizer(chat=CHAT))
    for corpus in mixture.corpora:
        batch = mixture.calibration(corpus)
        tokens, labels = batch.tokens, batch.labels
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.shape == labels.shape
        assert tokens.numel() >= 4096
        encoded = encoder.encode(mixture.held_out("calibration", corpus))
        if corpus == "code-instructions":
            assert (labels == -100).any()
            assert torch.equal(labels[labels != -100], tokens[labels != -100])
        else:
            assert torch.equal(tokens, labels)
            joined = np.concatenate([e.tokens for e in encoded])[: tokens.numel()]
            assert tokens.ravel().tolist() == joined.tolist()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_positions_count_from_the_beginning_of_each_document(tmp_path: Path, adds_bos: bool) -> None:
    """On disk, in a stream of shards, and held out: from BOS, or from the separator before a text."""
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    folder = tmp_path / "store" / "mixture" / "x"
    folder.mkdir(parents=True)
    path = notes(tmp_path / "notes", 80)
    data = data_of(files("whole", path), files("streamed", path, stream=True, max_tokens=2000), stream_shards=2)
    prepare(data, tokenizer, folder, seed=SEED)
    first = tokenizer.bos_token_id if adds_bos else tokenizer.eos_token_id
    with contextlib.closing(Mixture(folder, SEED, tmp_path / "work")) as mixture:
        batches = [mixture.batch(step, 8) for step in range(1, 4)] + [mixture.calibration("whole")]
    with contextlib.closing(Mixture(folder, SEED, tmp_path / "work", attend_across=True)) as mixture:
        across = [mixture.batch(step, 8) for step in range(1, 4)] + [mixture.calibration("whole")]
    assert {c for batch in batches for c in batch.corpora} == {0, 1}
    seen = 0
    for batch, other in zip(batches, across, strict=True):
        assert other.positions is None
        assert torch.equal(batch.tokens, other.tokens)
        assert torch.equal(other.labels, other.tokens)
        assert batch.positions is not None
        for tokens, positions, labels in zip(batch.tokens, batch.positions, batch.labels, strict=True):
            expected, position = [], 0
            for place, token in enumerate(tokens.tolist()):
                # The document that a separator leads from the end of its window is in the next one.
                is_head = token == first and (adds_bos or place < len(tokens) - 1)
                position = 0 if place == 0 or is_head else position + 1
                expected.append(position)
            assert positions.tolist() == expected
            seen += sum(p == 0 for p in expected[1:])
            # BOS is never predicted from another document; the separator ends the one before, which predicts it
            assert torch.equal(labels, tokens.masked_fill(positions == 0, -100) if adds_bos else tokens)
    assert seen >= 4


def test_labels_of_instructions_are_answers(mixture: Mixture) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    place = mixture.corpora.index("code-instructions")
    seen = 0
    for step in range(1, 40):
        batch = mixture.batch(step, 4)
        for tokens, labels, corpus in zip(batch.tokens, batch.labels, batch.corpora, strict=True):
            if corpus == place:
                seen += 1
                assert (labels[1:] != -100).any()
                answers = tokenizer.decode(labels[labels != -100])
                assert "Write the Python" not in answers
                assert "<|user|>" not in answers
            else:
                assert torch.equal(tokens, labels)
    assert seen >= 4


# batch(step)


def twin(mixture: Mixture, folder: Path, num_samples: int) -> list[tuple[int, list[int], list[int]]]:
    """Walks from the first sample, with a cursor for each corpus: slow, and it remembers."""
    entries = mixture.manifest["corpora"]
    cursors, orders = [0] * len(entries), [[] for _ in entries]  # type: ignore[var-annotated]
    samples: list[tuple[int, list[int], list[int]]] = []
    for block in range(-(-num_samples // BLOCK)):
        sorted_places = [c for c, entry in enumerate(entries) for _ in range(entry["samples_per_block"])]
        for place in permutation(BLOCK, SEED, "block", block):
            corpus = sorted_places[place]
            name = entries[corpus]["name"]
            tokens = np.load(folder / "train" / f"{name}.tokens.npy", mmap_mode="r")
            if cursors[corpus] % len(tokens) == 0:
                orders[corpus] = list(permutation(len(tokens), SEED, name, cursors[corpus] // len(tokens)))
            window = orders[corpus][cursors[corpus] % len(tokens)]
            cursors[corpus] += 1
            row = tokens[window].tolist()
            labels = row
            if entries[corpus]["instruction"]:
                mask = np.load(folder / "train" / f"{name}.mask.npy", mmap_mode="r")[window]
                labels = [token if label else -100 for token, label in zip(row, mask, strict=True)]
            samples.append((corpus, row, labels))
    return samples[:num_samples]


def test_batches_are_those_of_the_twin_in_any_order_and_size(mixture: Mixture, prepared: Path) -> None:
    samples = twin(mixture, prepared, 2 * BLOCK + 600)
    for step, sequences in [(1, 1), (300, 7), (2, 1000), (3, 5), (129, 16), (128, 8), (1, 2600), (374, 7), (1, 3)]:
        batch = mixture.batch(step, sequences)
        expected = samples[(step - 1) * sequences : step * sequences]
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.corpora == [corpus for corpus, _, _ in expected]
        assert batch.tokens.tolist() == [tokens for _, tokens, _ in expected]
        assert batch.labels.tolist() == [labels for _, _, labels in expected]


def test_a_batch_does_not_depend_on_what_was_asked_before(mixture: Mixture, prepared: Path) -> None:
    fresh = Mixture(prepared, SEED).batch(100, 8)
    for step in (1, 5000, 99):
        mixture.batch(step, 8)
    again = mixture.batch(100, 8)
    assert torch.equal(fresh.tokens, again.tokens)
    assert torch.equal(fresh.labels, again.labels)
    again.tokens.zero_()  # a batch is the caller's own
    assert torch.equal(mixture.batch(100, 8).tokens, fresh.tokens)
    assert not torch.equal(Mixture(prepared, SEED + 1).batch(100, 8).tokens, fresh.tokens)


def test_weights_are_exact_in_every_block(mixture: Mixture) -> None:
    per_block = [entry["samples_per_block"] for entry in mixture.manifest["corpora"]]
    assert per_block == [512, 307, 205, 0]
    for block in (0, 1, 77):
        found = Counter(mixture.sample(block * BLOCK + i)[0] for i in range(BLOCK))
        assert [found[corpus] for corpus in range(4)] == per_block
    assert [mixture.sample(i)[0] for i in range(BLOCK)] != [mixture.sample(BLOCK + i)[0] for i in range(BLOCK)]


def test_each_epoch_takes_every_window_once_in_another_order(mixture: Mixture) -> None:
    place = mixture.corpora.index("code-instructions")
    num = mixture.manifest["corpora"][place]["train"]["windows"]
    taken = [w for c, w in (mixture.sample(i) for i in range(4 * BLOCK)) if c == place]
    epochs = [taken[e * num : (e + 1) * num] for e in range(len(taken) // num)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


STAGES = [
    Stage(until_step=30, l1=0),
    Stage(until_step=60, l1=0, mixture={"code-instructions": 1, "package-docs": 2}),
    Stage(until_step=260, l1=0, mixture={"code-instructions": 1}),
]


def test_a_stage_takes_its_own_corpora_and_goes_on_where_the_one_before_left_off(
    mixture: Mixture, prepared: Path
) -> None:
    """Before a corpus has gone round no window of it comes again, whatever stages it was trained on in."""
    staged = Mixture(prepared, SEED, stages=STAGES)
    found: dict[int, list[bytes]] = {}
    for step in range(1, 61):
        batch, before = staged.batch(step, 4), mixture.batch(step, 4)
        assert torch.equal(batch.tokens, before.tokens) == (step <= 30)
        assert torch.equal(batch.tokens, Mixture(prepared, SEED, stages=STAGES).batch(step, 4).tokens)
        if step > 30:
            assert {staged.corpora[c] for c in batch.corpora} <= {"code-instructions", "package-docs"}
        for tokens, corpus in zip(batch.tokens, batch.corpora, strict=True):
            found.setdefault(corpus, []).append(tokens.numpy().tobytes())
    for corpus, rows in found.items():
        assert len(rows) > 30
        num_windows = mixture.manifest["corpora"][corpus]["train"]["windows"]
        name = mixture.corpora[corpus]
        on_disk = [row.astype(np.int64).tobytes() for row in np.load(prepared / "train" / f"{name}.tokens.npy")]
        expected = [on_disk[w] for w in permutation(num_windows, SEED, name, 0)]
        assert rows[:num_windows] == expected[: len(rows)]
    assert staged.batch(61, 4).corpora == [staged.corpora.index("code-instructions")] * 4


def test_epochs_are_the_turns_over_the_windows(mixture: Mixture, prepared: Path) -> None:
    staged = Mixture(prepared, SEED, stages=STAGES)
    taken = Counter(c for step in range(1, 201) for c in staged.batch(step, 4).corpora)
    windows = [entry["train"]["windows"] for entry in mixture.manifest["corpora"][:3]]
    assert staged.epochs(200, 4) == {
        name: taken[c] / windows[c] for c, name in enumerate(staged.corpora) if name != "notes"
    }
    assert staged.epochs(200, 4)["code-instructions"] > 5


@given(st.integers(0, 3000), st.integers())
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_one(length: int, key: int) -> None:
    assert sorted(permutation(length, key)) == list(range(length))


def test_permutations_never_change_between_versions() -> None:
    """A resumed training would otherwise go on with other data."""
    assert permutation(8, 42, "x", 0).tolist() == GOLDEN
    x = (int.from_bytes(hashlib.blake2b(b"42\0x\0000", digest_size=8).digest(), "big"), 0x9E3779B97F4A7C15, 2**64)
    slow = []
    for i in range(1, 9):
        z = (x[0] + i * x[1]) % x[2]
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % x[2]
        z = (z ^ z >> 27) * 0x94D049BB133111EB % x[2]
        slow.append(z ^ z >> 31)
    assert sorted(range(8), key=slow.__getitem__) == GOLDEN


GOLDEN = [3, 1, 2, 6, 0, 7, 5, 4]


# weights


def weighted(*weights: float) -> dict[str, float]:
    return {f"s{i}": weight for i, weight in enumerate(weights)}


@given(st.lists(st.floats(0.01, 1) | st.just(0.0), min_size=1, max_size=9).filter(any))
def test_block_counts_are_the_shares_to_within_one_sample(weights: list[float]) -> None:
    counts = list(block_counts(weighted(*weights)).values())
    assert sum(counts) == BLOCK
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * BLOCK) < 1
        assert (count == 0) == (weight == 0)


def test_the_largest_remainders_get_what_is_left() -> None:
    assert list(block_counts(weighted(1, 1, 1)).values()) == [342, 341, 341]
    assert list(block_counts(weighted(0.5, 0.3, 0.2)).values()) == [512, 307, 205]
    assert list(block_counts(weighted(0, 2)).values()) == [0, 1024]


def test_a_weight_too_small_to_be_sampled_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'s1': weight=0.0001 is less than 1/1024"):
        block_counts(weighted(1, 0.0001))


# another process


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gives_the_same_bytes(prepared: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_mixing import CHAT, SEED, prepare, real_data, tiny_tokenizer\n"
        f"prepare(real_data(Path({str(prepared.parent / 'notes')!r})), tiny_tokenizer(chat=CHAT),"
        f" Path({str(prepared.parent / 'other')!r}), seed=SEED)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    assert digests(prepared.parent / "other") == digests(prepared)
