"""The weighted mixture: corpora -> packed windows of a fixed length on disk -> ``batch(step)``, a pure function.

Folder layout, written by :func:`prepare` and read by :class:`Mixture`::

    manifest.json                     what it is made of, in tokens, documents, files and epochs
    train/CORPUS.tokens.npy           int32 [windows, seq_len]
    train/CORPUS.mask.npy             uint8 [windows, seq_len], 1 where the token is a label; instruction corpora only
    calibration/CORPUS.tokens.npy     held-out windows for the threshold search (and .mask.npy)
    calibration/CORPUS.jsonl          the held-out documents: {id, file, text, prompt? messages?, num_tokens}
    evaluation/CORPUS.jsonl           likewise, of other files
    held_out.json                     {files, keys}: what no training window holds
    evaluation/choices.jsonl          {id, file, question, choices, answer}: made of held-out evaluation code
    streams.json, tokenizer/          of streamed corpora, instead of train/: what their shards are made from
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prosparse_core.data import code_corpora
from prosparse_core.data.documents import Document, from_row, stable_hash
from prosparse_core.data.encoding import Encoders
from prosparse_core.data.held_out import HELD_OUT, RULE, HeldOut
from prosparse_core.data.packing import Encoder
from prosparse_core.data.processes import num_processes
from prosparse_core.data.shards import SPLITS, Corpus, write_jsonl
from prosparse_core.data.stream import DESCRIPTION, TOKENIZER
from prosparse_core.data.stream_reader import Streams
from prosparse_core.data.train_windows import PROGRESS, SHARD_TOKENS, TrainWindows, Written
from prosparse_core.errors import BadInput
from prosparse_core.progress import Progress, Silent
from prosparse_core.recipe import Data, Source
from prosparse_core.store import fsync_tree, write_json

if TYPE_CHECKING:
    import torch

BLOCK = 1024
"""Samples in which every corpus has exactly its share."""
MANIFEST = "manifest.json"
CHOICES = "choices"


def prepare(
    data: Data,
    tokenizer: Any,
    folder: Path,
    *,
    seed: int,
    train_tokens: int,
    processes: int | None = 1,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the mixture into ``folder``, going on from what an interrupted attempt left there; returns its manifest.

    The same data, tokenizer and seed give the same windows: ``train_tokens``, the tokens of the planned training, only
    tells the manifest how many epochs it makes over each corpus.

    Args:
        processes: that tokenize, to the same bits; None: the cores, where there is enough to do.
        shard_tokens: how much is written between two places to go on from; part of what decides the windows.

    Raises:
        BadInput: a source cannot be read, or has too little text; a weight is too small to be seen.
        EnvironmentProblem: the hub cannot be reached.
    """
    progress = progress or Silent()
    encoder = Encoder(tokenizer)
    counts = block_counts(data.sources)
    corpora = [Corpus(source, encoder, data, seed) for source in data.sources]
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)

    held_out, about = hold_out(corpora, data, folder, seed=seed)
    streams = {c.name: c.describe_stream() for c in corpora if c.source.stream and counts[c.name]}
    if streams:
        (folder / DESCRIPTION).write_text(json.dumps(streams, indent=1) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder / TOKENIZER)

    trained = [corpus for corpus in corpora if counts[corpus.name] and not corpus.source.stream]
    written = {corpus.name: Written() for corpus in corpora}
    done, total = 0, sum(corpus.source.max_tokens for corpus in trained)
    with Encoders(tokenizer, held_out, num_processes(processes, total)) as encoders:
        for corpus in trained:
            windows = TrainWindows(
                corpus.name,
                folder,
                corpus.documents,
                seq_len=data.seq_len,
                max_tokens=corpus.source.max_tokens,
                is_chat=corpus.is_instruction,
                shard_tokens=shard_tokens,
            )
            for tokens in windows.write(encoders):
                progress.update(done + tokens, total, corpus=corpus.name)
            written[corpus.name] = windows.written
            done += corpus.source.max_tokens
    progress.update(total, total)

    entries = []
    for corpus in corpora:
        share, train = counts[corpus.name] / BLOCK, written[corpus.name].describe(data.seq_len)
        entries.append(corpus.describe(share, share * train_tokens, train) | {"samples_per_block": counts[corpus.name]})
        if entries[-1]["epochs"] > 1:
            progress.note(f"{corpus.name}: training goes {entries[-1]['epochs']:.1f} times over its text")
    manifest = {
        "seq_len": data.seq_len,
        "seed": seed,
        "train_tokens": train_tokens,
        "tokenizer": encoder.description,
        **about,
        "corpora": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return manifest


def hold_out(corpora: Sequence[Corpus], data: Data, folder: Path, *, seed: int) -> tuple[HeldOut, dict[str, Any]]:
    """Draw what is held out of all corpora, and write it, unless an earlier attempt has; and what to say of it."""
    record = folder / PROGRESS / HELD_OUT
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        for corpus in corpora:
            corpus.splits = found["splits"][corpus.name]
        return HeldOut.from_plain(json.loads((folder / HELD_OUT).read_text(encoding="utf-8"))), found["about"]
    held_out = HeldOut()
    for corpus in corpora:
        corpus.write_held_out(folder, held_out)
    questions: list[code_corpora.Question] = []
    if data.choice_questions:
        drawn = held_out.files["evaluation"]
        questions, files = code_corpora.choice_questions(data.choice_questions, seed=seed, drawn=drawn)
        write_jsonl(folder / "evaluation" / f"{CHOICES}.jsonl", (question.row for question in questions))
        for question in questions:
            held_out.add(question.function.document)
        for file in files:
            held_out.add_file(file)
    splits = {corpus.name: corpus.splits for corpus in corpora}
    counted = [entry for found in splits.values() for entry in found.values()]
    about = {
        "choice_questions": len(questions),
        "held_out": {
            "rule": RULE,
            "documents": sum(entry["documents"] for entry in counted),
            "tokens": sum(entry["tokens"] for entry in counted),
            "files": {split: len(files) for split, files in held_out.files.items()},
        },
    }
    write_json(folder / HELD_OUT, held_out.to_plain())
    fsync_tree(folder)
    record.parent.mkdir(exist_ok=True)
    write_json(record, {"splits": splits, "about": about})
    return held_out, about


def block_counts(sources: list[Source]) -> dict[str, int]:
    """Samples of each source in a block of ``BLOCK``: its share of the weights, by the largest remainder.

    Raises:
        BadInput: a weight above 0 that is too small to get one sample.
    """
    whole = sum(source.weight for source in sources)
    exact = [source.weight / whole * BLOCK for source in sources]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if source.weight > 0 and count == 0:
            raise BadInput(
                f"source {source.name!r}: weight={source.weight} is less than 1/{BLOCK} of all weights: never sampled",
                hint="raise the weight, or set it to 0 to measure on this corpus without training on it",
            )
    return {source.name: count for source, count in zip(sources, counts, strict=True)}


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``labels`` int64 [sequences, seq_len].

    Labels equal tokens, or are -100 where there is no loss; the model shifts them.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    corpora: list[int]
    """Of each sequence: its place in :attr:`Mixture.corpora`."""


@dataclass
class _Windows:
    """The windows of a corpus that lies on disk whole; its samples go over them, shuffled anew in each epoch."""

    tokens: np.ndarray
    mask: np.ndarray | None
    key: tuple[object, ...] = ()
    epochs: dict[int, np.ndarray] = field(default_factory=dict)

    def place(self, turn: int) -> int:
        """The window of the corpus's sample ``turn`` (from 0)."""
        epoch, at = divmod(turn, len(self.tokens))
        if epoch not in self.epochs:
            if len(self.epochs) > 1:
                self.epochs.clear()
            self.epochs[epoch] = permutation(len(self.tokens), *self.key, epoch)
        return int(self.epochs[epoch][at])

    def window(self, turn: int) -> tuple[np.ndarray, np.ndarray | None]:
        place = self.place(turn)
        return self.tokens[place], None if self.mask is None else self.mask[place]


@dataclass
class _Streamed:
    """A corpus that comes in shards: sample ``turn`` is window ``turn``, shuffled within its shard."""

    streams: Streams
    name: str
    key: tuple[object, ...]

    def window(self, turn: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.streams.window(self.name, turn, lambda shard, n: permutation(n, *self.key, shard))


class Mixture:
    """Reads a prepared folder. Everything is a pure function of the folder's contents and the seed.

    Sample ``i`` (from 0) belongs to block ``i // 1024``, in which every corpus has its ``samples_per_block`` places, in
    an order shuffled by the seed and the block. The ``k``-th sample of a corpus of ``n`` windows takes window
    ``permutation(corpus, epoch=k // n)[k % n]``; of a streamed corpus, window ``k``, shuffled in its shard.

    Args:
        work: where the shards of streamed corpora may lie while batches are taken, in rising steps; then :meth:`close`.
        prepares: whether this process has the shards prepared; of several that read the same ``work``, one does.
        processes: that tokenize them; None: the cores, where there is enough to do.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        work: Path | None = None,
        *,
        prepares: bool = True,
        processes: int | None = None,
    ) -> None:
        self._folder, self._seed = Path(folder), seed
        self._streams = Streams(self._folder, work, prepares=prepares, processes=processes) if work else None
        self.manifest: dict[str, Any] = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))
        self.seq_len: int = self.manifest["seq_len"]
        self._counts: list[int] = [entry["samples_per_block"] for entry in self.manifest["corpora"]]
        self._train = [
            self._open_train(entry["name"], bool(entry.get("stream"))) if entry["samples_per_block"] else None
            for entry in self.manifest["corpora"]
        ]
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    @property
    def corpora(self) -> list[str]:
        """All corpora, also those of weight 0, in the order of the recipe."""
        return [entry["name"] for entry in self.manifest["corpora"]]

    def batch(self, step: int, sequences: int) -> Batch:
        """The samples ``(step - 1) * sequences`` and following; ``step`` counts from 1."""
        import torch

        assert step >= 1
        assert sequences >= 1
        tokens = np.empty((sequences, self.seq_len), dtype=np.int64)
        labels = np.empty_like(tokens)
        corpora = []
        self._release((step - 1) * sequences)
        for row in range(sequences):
            corpus, turn = self._turn((step - 1) * sequences + row)
            source = self._train[corpus]
            assert source is not None
            tokens[row], mask = source.window(turn)
            labels[row] = tokens[row] if mask is None else np.where(mask, tokens[row], -100)
            corpora.append(corpus)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), corpora)

    def close(self) -> None:
        """End the preparation of streamed corpora, if there are any."""
        if self._streams is not None:
            self._streams.close()

    def _release(self, index: int) -> None:
        """Samples before ``index`` are not needed any more."""
        streamed = [i for i, source in enumerate(self._train) if isinstance(source, _Streamed)]
        if not streamed:
            return
        block, place = divmod(index, BLOCK)
        corpora, _ = self._block(block)
        before = {i: block * self._counts[i] + int((corpora[:place] == i).sum()) for i in streamed}
        assert self._streams is not None
        self._streams.release({self.corpora[i]: turn for i, turn in before.items()})

    def sample(self, index: int) -> tuple[int, int]:
        """Corpus and window of sample ``index`` (from 0); of a streamed corpus, the window's place in the stream."""
        corpus, turn = self._turn(index)
        source = self._train[corpus]
        return corpus, source.place(turn) if isinstance(source, _Windows) else turn

    def _turn(self, index: int) -> tuple[int, int]:
        """Corpus of sample ``index``, and how many of its samples precede it."""
        block, place = divmod(index, BLOCK)
        corpora, ranks = self._block(block)
        corpus = int(corpora[place])
        return corpus, block * self._counts[corpus] + int(ranks[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in the block: its corpus, and how many samples of that corpus precede it in the block."""
        corpora = np.repeat(np.arange(len(self._counts)), self._counts)[permutation(BLOCK, self._seed, "block", block)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for corpus, count in enumerate(self._counts):
            ranks[corpora == corpus] = np.arange(count)
        return corpora, ranks

    def calibration(self, corpus: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out windows for the threshold search: tokens and labels, int64 [windows, seq_len]."""
        import torch

        windows = self._open("calibration", corpus)
        tokens = np.array(windows.tokens, dtype=np.int64)
        labels = tokens.copy() if windows.mask is None else np.where(windows.mask, tokens, -100)
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def held_out(self, split: str, corpus: str) -> list[Document]:
        """The documents of ``calibration`` or ``evaluation``; ``packing.Encoder`` turns them into tokens."""
        with (self._folder / split / f"{corpus}.jsonl").open(encoding="utf-8") as handle:
            return [from_row(json.loads(line)) for line in handle]

    def _open(self, split: str, name: str) -> _Windows:
        mask = self._folder / split / f"{name}.mask.npy"
        tokens = np.load(self._folder / split / f"{name}.tokens.npy", mmap_mode="r")
        return _Windows(tokens, np.load(mask, mmap_mode="r") if mask.exists() else None, (self._seed, name))

    def _open_train(self, name: str, is_streamed: bool) -> _Windows | _Streamed | None:
        if not is_streamed:
            return self._open("train", name)
        return _Streamed(self._streams, name, (self._seed, name)) if self._streams is not None else None


def permutation(length: int, *key: object) -> np.ndarray:
    """A permutation of ``range(length)`` by the key.

    Sorted by splitmix64 rather than drawn from a library's generator, whose stream may change with its version.
    """
    x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.array(stable_hash(*key), dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
