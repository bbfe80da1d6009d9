"""The weighted mixture: corpora -> packed windows of a fixed length on disk -> ``batch(step)``, a pure function.

Folder layout, written by :func:`prepare` and read by :class:`Mixture`::

    manifest.json                     what it is made of, in tokens, documents and files
    train/CORPUS.tokens.npy           int32 [windows, seq_len]
    train/CORPUS.begins.npy           uint8 [windows, ceil(seq_len / 8)], packed bits: 1 where another document begins
    train/CORPUS.mask.npy             uint8 [windows, seq_len], 1 where the token is a label; instruction corpora only
    calibration/CORPUS.tokens.npy     held-out windows for the threshold search (and .begins.npy, .mask.npy)
    calibration/CORPUS.jsonl          the held-out documents: {id, file, text, prompt? messages?, num_tokens}
    evaluation/CORPUS.jsonl           likewise, of other files
    held_out.json                     {files, keys}: what no training window holds
    evaluation/choices.jsonl          {id, file, question, choices, answer}: made of held-out evaluation code
    streams.json, tokenizer/          of streamed corpora, instead of train/: what their shards are made from
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prosparse_core.data import code_corpora
from prosparse_core.data.documents import Document, from_row
from prosparse_core.data.encoding import Encoders
from prosparse_core.data.held_out import HELD_OUT, RULE, HeldOut
from prosparse_core.data.packing import Encoder
from prosparse_core.data.processes import num_processes
from prosparse_core.data.shards import SPLITS, Corpus, write_jsonl
from prosparse_core.data.stream import DESCRIPTION, TOKENIZER
from prosparse_core.data.stream_reader import Row, Streams
from prosparse_core.data.train_windows import PROGRESS, SHARD_TOKENS, TrainWindows, Written
from prosparse_core.progress import Progress, Silent
from prosparse_core.recipe import Data
from prosparse_core.recipe_mixture import BLOCK, block_counts, trained_corpora
from prosparse_core.recipe_train import Stage
from prosparse_core.shares import SampleOrder, permutation, segments_of
from prosparse_core.store import fsync_tree, write_json

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
CHOICES = "choices"


def prepare(
    data: Data,
    tokenizer: Any,
    folder: Path,
    *,
    seed: int,
    stages: Sequence[Stage] = (),
    processes: int | None = 1,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the mixture into ``folder``, going on from what an interrupted attempt left there; returns its manifest.

    The same data, tokenizer and seed give the same windows; of ``stages`` only counts which corpora they train on,
    since only these get training windows. So a change of a stage leaves what the stages before it saw as it is.

    Args:
        processes: that tokenize, to the same bits; None: the cores, where there is enough to do.
        shard_tokens: how much is written between two places to go on from; part of what decides the windows.

    Raises:
        BadInput: a source cannot be read, or has too little text; a weight is too small to be seen.
        EnvironmentProblem: the hub cannot be reached.
    """
    progress = progress or Silent()
    encoder = Encoder(tokenizer)
    weights = {source.name: source.weight for source in data.sources}
    counts, needed = block_counts(weights), trained_corpora(weights, stages)
    corpora = [Corpus(source, encoder, data, seed) for source in data.sources]
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)

    held_out, about = hold_out(corpora, data, folder, seed=seed)
    streams = {c.name: c.describe_stream() for c in corpora if c.source.stream and c.name in needed}
    if streams:
        (folder / DESCRIPTION).write_text(json.dumps(streams, indent=1) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder / TOKENIZER)

    trained = [corpus for corpus in corpora if corpus.name in needed and not corpus.source.stream]
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
                num_leading=encoder.num_leading(is_chat=corpus.is_instruction),
                shard_tokens=shard_tokens,
            )
            for tokens in windows.write(encoders):
                progress.update(done + tokens, total, corpus=corpus.name)
            written[corpus.name] = windows.written
            done += corpus.source.max_tokens
    progress.update(total, total)

    entries = [
        corpus.describe(counts[corpus.name] / BLOCK, written[corpus.name].describe(data.seq_len))
        | {"trained": corpus.name in needed, "samples_per_block": counts[corpus.name]}
        for corpus in corpora
    ]
    manifest = {
        "seq_len": data.seq_len,
        "seed": seed,
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


@dataclass(frozen=True)
class Batch:
    """``tokens``, ``labels`` and ``positions`` int64 [sequences, seq_len].

    Labels equal tokens, or are -100 where there is no loss; the model shifts them. Positions count from 0 in each
    document, which sees no other (:mod:`prosparse_core.document_masks`); None where documents attend to each other.
    A token with which a document begins by itself (BOS) is then no label: it would be predicted from another document.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    corpora: list[int]
    """Of each sequence: its place in :attr:`Mixture.corpora`."""
    positions: torch.Tensor | None = None


@dataclass
class _Windows:
    """The windows of a corpus that lies on disk whole; its samples go over them, shuffled anew in each epoch."""

    tokens: np.ndarray
    begins: np.ndarray
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

    def window(self, turn: int) -> Row:
        place = self.place(turn)
        return self.tokens[place], self.begins[place], None if self.mask is None else self.mask[place]


@dataclass
class _Streamed:
    """A corpus that comes in shards: sample ``turn`` is window ``turn``, shuffled within its shard."""

    streams: Streams
    name: str
    key: tuple[object, ...]

    def window(self, turn: int) -> Row:
        return self.streams.window(self.name, turn, lambda shard, n: permutation(n, *self.key, shard))


class Mixture:
    """Reads a prepared folder. Everything is a pure function of the folder's contents and the seed.

    Which corpus a sample is of: :mod:`prosparse_core.shares`. The ``k``-th sample of a corpus of ``n`` windows takes
    window ``permutation(corpus, epoch=k // n)[k % n]``; of a streamed corpus, window ``k``, shuffled in its shard.

    Args:
        stages: of the training, up to the one whose batches are taken; without them, every batch has the weights of
            ``data.sources``.
        work: where the shards of streamed corpora may lie while batches are taken, in rising steps; then :meth:`close`.
        attend_across: documents of a window attend to each other (``data.attend_across_documents``).
        prepares: whether this process has the shards prepared; of several that read the same ``work``, one does.
        processes: that tokenize them; None: the cores, where there is enough to do.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        work: Path | None = None,
        *,
        stages: Sequence[Stage] = (),
        attend_across: bool = False,
        prepares: bool = True,
        processes: int | None = None,
    ) -> None:
        self._folder, self._seed = Path(folder), seed
        self._streams = Streams(self._folder, work, prepares=prepares, processes=processes) if work else None
        self.manifest: dict[str, Any] = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))
        self.seq_len: int = self.manifest["seq_len"]
        self._stages, self.attend_across = tuple(stages), attend_across
        self._train = [
            self._open_train(entry["name"], bool(entry.get("stream"))) if entry["trained"] else None
            for entry in self.manifest["corpora"]
        ]
        self._order = functools.lru_cache(maxsize=4)(self._order_of)

    @property
    def corpora(self) -> list[str]:
        """All corpora, also those of weight 0, in the order of the recipe."""
        return [entry["name"] for entry in self.manifest["corpora"]]

    @property
    def shares(self) -> dict[str, float]:
        """The share of each corpus in the training mixture: what it weighs where corpora are taken together."""
        return {entry["name"]: entry["share"] for entry in self.manifest["corpora"]}

    def batch(self, step: int, sequences: int) -> Batch:
        """The samples ``(step - 1) * sequences`` and following; ``step`` counts from 1."""
        assert step >= 1
        assert sequences >= 1
        rows, corpora = [], []
        order, first = self._order(sequences), (step - 1) * sequences
        self._release(order, first)
        for row in range(sequences):
            corpus, turn = order.turn(first + row)
            source = self._train[corpus]
            assert source is not None
            rows.append(source.window(turn))
            corpora.append(corpus)
        return self._batch_of(rows, corpora)

    def _batch_of(self, rows: Sequence[Row], corpora: list[int]) -> Batch:
        import torch

        from prosparse_core.document_masks import positions_of

        shape = (len(rows), self.seq_len)
        tokens = np.array([row for row, _, _ in rows], dtype=np.int64).reshape(shape)
        masks = np.array([np.ones_like(row) if mask is None else mask for row, _, mask in rows]).reshape(shape)
        labels = torch.from_numpy(np.where(masks, tokens, -100))
        positions = None
        if not self.attend_across:
            packed = np.array([begins for _, begins, _ in rows], dtype=np.uint8).reshape(
                len(rows), -(-self.seq_len // 8)
            )
            begins = torch.from_numpy(np.unpackbits(packed, axis=-1, count=self.seq_len)).bool()
            positions = positions_of(begins)
            if self.manifest["tokenizer"]["document_prefix"]:
                labels.masked_fill_(positions == 0, -100)
        return Batch(torch.from_numpy(tokens), labels, corpora, positions)

    def close(self) -> None:
        """End the preparation of streamed corpora, if there are any."""
        if self._streams is not None:
            self._streams.close()

    def rewind(self) -> None:
        """Let the next batch be of an earlier step than the last one's."""
        if self._streams is not None:
            self._streams.close()

    def _release(self, order: SampleOrder, index: int) -> None:
        """Samples before ``index`` are not needed any more."""
        needed, before = order.needed(index), order.before(index)
        streamed = [i for i, train in enumerate(self._train) if isinstance(train, _Streamed) and needed[i]]
        first = {self.corpora[i]: before[i] for i in streamed}
        if first:
            assert self._streams is not None
            self._streams.release(first)

    def sample(self, index: int, sequences: int = 1) -> tuple[int, int]:
        """Corpus and window of sample ``index`` (from 0); of a streamed corpus, the window's place in the stream."""
        corpus, turn = self._order(sequences).turn(index)
        source = self._train[corpus]
        return corpus, source.place(turn) if isinstance(source, _Windows) else turn

    def epochs(self, step: int, sequences: int) -> dict[str, float]:
        """How often training has gone over the windows of each corpus after ``step``; streamed ones are not counted."""
        taken = zip(self.corpora, self._train, self._order(sequences).before(step * sequences), strict=True)
        return {name: turns / len(t.tokens) for name, t, turns in taken if isinstance(t, _Windows)}

    def _order_of(self, sequences: int) -> SampleOrder:
        entries = self.manifest["corpora"]
        return SampleOrder(
            self._seed, segments_of({e["name"]: e["samples_per_block"] for e in entries}, self._stages, sequences)
        )

    def calibration(self, corpus: str) -> Batch:
        """Held-out windows for the threshold search; without a corpus's windows, a batch of none."""
        found = self._open("calibration", corpus)
        masks = [None] * len(found.tokens) if found.mask is None else found.mask
        rows = list(zip(found.tokens, found.begins, masks, strict=True))
        return self._batch_of(rows, [self.corpora.index(corpus)] * len(rows))

    def held_out(self, split: str, corpus: str) -> list[Document]:
        """The documents of ``calibration`` or ``evaluation``; ``packing.Encoder`` turns them into tokens."""
        with (self._folder / split / f"{corpus}.jsonl").open(encoding="utf-8") as handle:
            return [from_row(json.loads(line)) for line in handle]

    def _open(self, split: str, name: str) -> _Windows:
        mask = self._folder / split / f"{name}.mask.npy"
        tokens, begins = (
            np.load(self._folder / split / f"{name}.{k}.npy", mmap_mode="r") for k in ("tokens", "begins")
        )
        return _Windows(tokens, begins, np.load(mask, mmap_mode="r") if mask.exists() else None, (self._seed, name))

    def _open_train(self, name: str, is_streamed: bool) -> _Windows | _Streamed | None:
        if not is_streamed:
            return self._open("train", name)
        return _Streamed(self._streams, name, (self._seed, name)) if self._streams is not None else None
