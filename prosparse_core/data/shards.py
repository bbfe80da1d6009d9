"""One corpus on its way to disk: held-out documents first, then the training windows."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core.data.packing import Encoded, Encoder, RowWriter, Window, pack_texts, pack_whole
from prosparse_core.data.sources import Document, documents, split_of
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Data, Source

SPLITS = ("train", "calibration", "evaluation")
MAX_HELD_OUT_TOKENS = 2000
MIN_HELD_OUT_DOCUMENTS = 8
"""Held-out texts are cut (longer instructions left out) so that as many are seen, unless very few tokens are asked."""


class _Tally:
    """What went into one split of a corpus."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.windows = self.labels = self.filler = 0
        self.files: set[str] = set()

    def add_document(self, document: Document) -> None:
        self.documents += 1
        self.files.add(document.file)

    def add_window(self, window: Window) -> None:
        self.windows += 1
        self.tokens += len(window.tokens)
        self.labels += int(window.mask.sum())
        self.filler += window.num_filler

    def describe(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "files": len(self.files),
            "tokens": self.tokens,
            "windows": self.windows,
            "label_share": self.labels / self.tokens if self.tokens else None,
            "filler_tokens": self.filler,
        }


class Corpus:
    """One source on its way to disk. Documents are drawn once: held-out ones first, the others wait for training."""

    def __init__(self, source: Source, encoder: Encoder, data: Data, seed: int) -> None:
        self.source, self.name, self._encoder, self._data, self._seed = source, source.name, encoder, data, seed
        stream = documents(source, seed=seed)
        first = next(stream, None)
        if first is None:
            raise BadInput(f"source {source.name!r} has no text", hint="check its path and columns")
        self._stream = itertools.chain([first], stream)
        self.is_instruction = first.prompt is not None
        if self.is_instruction:
            encoder.chat_format()
        self._waiting: list[Document] = []
        self._tallies = {split: _Tally() for split in SPLITS}
        self._num_duplicates = 0

    def _pack(self, encoded: Iterable[Encoded]) -> Iterator[Window]:
        pack = pack_whole if self.is_instruction else pack_texts
        return pack(encoded, self._data.seq_len, self._encoder.num_leading(is_chat=self.is_instruction))

    def write_held_out(self, folder: Path) -> set[bytes]:
        """Draw until both held-out splits have their tokens; returns the keys of what training must not see."""
        keys: set[bytes] = set()
        self._write_calibration(folder / "calibration", keys)
        self._write_evaluation(folder / "evaluation", keys)
        return keys

    def _write_calibration(self, folder: Path, keys: set[bytes]) -> None:
        asked, seq_len, tally = self._data.calibration_tokens, self._data.seq_len, self._tallies["calibration"]
        drawn: list[Encoded] = []
        used: set[Document] = set()
        num_windows = math.ceil(asked / seq_len)
        with Shard(folder, self.name, seq_len, self.is_instruction) as shard:
            windows = self._pack(self._draw("calibration", asked, keys, drawn))
            for window in itertools.islice(windows, num_windows):
                shard.add(window)
                tally.add_window(window)
                used.update(window.starts)
        if tally.windows < num_windows:
            raise self._too_little("calibration", tally.tokens, asked)
        self._write_documents(folder, "calibration", [item for item in drawn if item.document in used])

    def _write_evaluation(self, folder: Path, keys: set[bytes]) -> None:
        asked, tally = self._data.evaluation_tokens, self._tallies["evaluation"]
        drawn: list[Encoded] = []
        for encoded in self._draw("evaluation", asked, keys, drawn):
            tally.tokens += len(encoded.tokens)
            tally.labels += int(encoded.mask.sum())
            if tally.tokens >= asked:
                break
        if tally.tokens < asked:
            raise self._too_little("evaluation", tally.tokens, asked)
        self._write_documents(folder, "evaluation", drawn)

    def _draw(self, split: str, asked: int, keys: set[bytes], drawn: list[Encoded]) -> Iterator[Encoded]:
        """The documents of a held-out split, each text once. What is read on the way waits for the other splits."""
        limit = min(max(asked // MIN_HELD_OUT_DOCUMENTS, 512), MAX_HELD_OUT_TOKENS)
        for document in itertools.chain(tuple(self._waiting), self._read()):
            if split_of(document.file) != split or document.key in keys:
                continue
            if document.prompt is None:
                encoded = self._encoder.cut(document, limit)
            else:
                encoded = self._encoder.encode([document])[0]
                if len(encoded.tokens) > limit:
                    continue
            keys.add(document.key)
            drawn.append(encoded)
            yield encoded

    def _read(self) -> Iterator[Document]:
        for document in self._stream:
            self._waiting.append(document)
            yield document

    def _too_little(self, split: str, have: int, asked: int) -> BadInput:
        return BadInput(
            f"corpus {self.name!r} has {have} held-out tokens for {split}, {asked} asked"
            + (f" in whole windows of {self._data.seq_len}" if split == "calibration" else ""),
            hint=f"lower data.{split}_tokens or add files (whole files are held out: one is not enough)",
        )

    def _write_documents(self, folder: Path, split: str, found: list[Encoded]) -> None:
        write_jsonl(folder / f"{self.name}.jsonl", map(_held_out_row, found))
        for encoded in found:
            self._tallies[split].add_document(encoded.document)

    def write_train(self, folder: Path, held_out: set[bytes]) -> Iterator[int]:
        """Write the training windows, telling after each how many tokens there are."""
        tally, seq_len = self._tallies["train"], self._data.seq_len
        num_windows = self.source.max_tokens // seq_len
        with Shard(folder / "train", self.name, seq_len, self.is_instruction) as shard:
            encoded = self._encoder.encode_in_batches(self._train_documents(held_out))
            for window in itertools.islice(self._pack(encoded), num_windows):
                shard.add(window)
                tally.add_window(window)
                for document in window.starts:
                    tally.add_document(document)
                yield tally.tokens
        self._waiting.clear()
        if not tally.windows:
            raise BadInput(
                f"corpus {self.name!r} has fewer training tokens than one window of seq_len={seq_len}"
                f" (max_tokens={self.source.max_tokens})",
                hint="add files, raise max_tokens or lower data.seq_len",
            )

    def _train_documents(self, held_out: set[bytes]) -> Iterator[Document]:
        for document in itertools.chain(self._waiting, self._stream):
            if split_of(document.file) == "train":
                if document.key in held_out:
                    self._num_duplicates += 1
                else:
                    yield document

    def describe_stream(self, held_out: set[bytes]) -> dict[str, Any]:
        """What the shards of a streamed corpus are made from; see :mod:`prosparse_core.data.stream`."""
        self._waiting.clear()
        return {
            "source": self.source.model_dump(mode="json"),
            "seed": self._seed,
            "seq_len": self._data.seq_len,
            "windows_per_shard": self.source.max_tokens // self._data.stream_shards // self._data.seq_len,
            "max_shards": self._data.stream_shards,
            "held_out": sorted(key.hex() for key in held_out),
        }

    def describe(self, share: float) -> dict[str, Any]:
        """The corpus in the manifest."""
        splits = {split: tally.describe() for split, tally in self._tallies.items()}
        splits["train"]["duplicates_of_held_out_removed"] = self._num_duplicates
        return {
            "name": self.name,
            "kind": self.source.kind,
            "instruction": self.is_instruction,
            "weight": self.source.weight,
            "share": share,
            **({"stream": True} if self.source.stream else {}),
            **splits,
        }


class Shard:
    """The windows of one corpus in one split: tokens, beginnings of documents, and labels where not all tokens are."""

    def __init__(self, folder: Path, name: str, seq_len: int, with_mask: bool) -> None:
        self._tokens = RowWriter(folder / f"{name}.tokens.npy", seq_len, np.int32)
        self._begins = RowWriter(folder / f"{name}.begins.npy", -(-seq_len // 8), np.uint8)
        self._mask = RowWriter(folder / f"{name}.mask.npy", seq_len, np.uint8) if with_mask else None
        self._stack = ExitStack()

    def __enter__(self) -> Shard:
        for writer in (self._tokens, self._begins, self._mask):
            if writer is not None:
                self._stack.enter_context(writer)
        return self

    def add(self, window: Window) -> None:
        self._tokens.add(window.tokens)
        self._begins.add(np.packbits(window.begins))
        if self._mask is not None:
            self._mask.add(window.mask)

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def _held_out_row(encoded: Encoded) -> dict[str, Any]:
    document = encoded.document
    row: dict[str, Any] = {"id": document.id, "file": document.file, "text": document.text}
    if document.prompt is not None:
        row["prompt"] = document.prompt
    return row | {"num_tokens": len(encoded.tokens)}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")  # ASCII, so that no character can break a line
