"""One corpus on its way to disk: what of it is held out, before any training window is written."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core.data.documents import Document, split_of, to_row
from prosparse_core.data.held_out import HELD_OUT_SPLITS, ORDER, HeldOut
from prosparse_core.data.packing import Encoded, Encoder, RowWriter, Window, pack_texts, pack_whole
from prosparse_core.data.sources import documents
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Data, Source

SPLITS = ("train", *HELD_OUT_SPLITS)
LONGEST_CHAT = 512
"""Tokens of a held-out chat, where a window has fewer."""


class _Tally:
    """What went into one split of a corpus."""

    def __init__(self) -> None:
        self.documents = self.spans = self.tokens = self.windows = self.labels = self.filler = 0
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
            **({"spans": self.spans} if self.spans else {}),
            "files": len(self.files),
            "tokens": self.tokens,
            "windows": self.windows,
            "label_share": self.labels / self.tokens if self.tokens else None,
            "filler_tokens": self.filler,
        }


class Corpus:
    """One source, and what of it is held out: drawn before any corpus is trained on."""

    def __init__(self, source: Source, encoder: Encoder, data: Data, seed: int) -> None:
        self.source, self.name, self._encoder, self._data, self._seed = source, source.name, encoder, data, seed
        first = next(self.documents(), None)
        if first is None:
            raise BadInput(f"source {source.name!r} has no text", hint="check its path and columns")
        self.is_instruction = first.chat is not None
        if self.is_instruction:
            encoder.chat_format()
        self.splits: dict[str, dict[str, Any]] = {split: _Tally().describe() for split in HELD_OUT_SPLITS}
        """Counts for the manifest."""

    def documents(self) -> Iterator[Document]:
        """From the first on, in the order of training."""
        return documents(self.source, seed=self._seed)

    def _pack(self, encoded: Iterable[Encoded]) -> Iterator[Window]:
        pack = pack_whole if self.is_instruction else pack_texts
        return pack(encoded, self._data.seq_len, self._encoder.num_leading(is_chat=self.is_instruction))

    def write_held_out(self, folder: Path, held_out: HeldOut) -> None:
        """Draw until both held-out splits have their tokens, and add what is drawn to ``held_out``."""
        self._candidates: list[Document] = []
        self._reading, self._drawn = documents(self.source, seed=ORDER), set[bytes]()
        self._write_calibration(folder / "calibration", held_out)
        self._write_evaluation(folder / "evaluation", held_out)
        self._candidates.clear()

    def _write_calibration(self, folder: Path, held_out: HeldOut) -> None:
        asked, seq_len, tally = self._data.calibration_tokens, self._data.seq_len, _Tally()
        drawn: list[tuple[Document, Encoded]] = []
        used: set[Document] = set()
        num_windows = math.ceil(asked / seq_len)
        with Shard(folder, self.name, seq_len, self.is_instruction) as shard:
            windows = self._pack(self._draw("calibration", drawn))
            for window in itertools.islice(windows, num_windows):
                shard.add(window)
                tally.add_window(window)
                used.update(window.starts)
        if tally.windows < num_windows:
            raise self._too_little("calibration", tally.tokens, asked)
        # Packing looks ahead: what went into no window is trained on.
        self._write_documents(folder, tally, [pair for pair in drawn if pair[1].document in used], held_out)
        self.splits["calibration"] = tally.describe()

    def _write_evaluation(self, folder: Path, held_out: HeldOut) -> None:
        asked, tally = self._data.evaluation_tokens, _Tally()
        drawn: list[tuple[Document, Encoded]] = []
        for encoded in self._draw("evaluation", drawn):
            tally.tokens += len(encoded.tokens)
            tally.labels += int(encoded.mask.sum())
            if tally.tokens >= asked:
                break
        if tally.tokens < asked:
            raise self._too_little("evaluation", tally.tokens, asked)
        self._write_documents(folder, tally, drawn, held_out)
        self.splits["evaluation"] = tally.describe()

    def _draw(self, split: str, drawn: list[tuple[Document, Encoded]]) -> Iterator[Encoded]:
        """The documents of a held-out split, each text once. Those that may be drawn for the other wait for it.

        Of a text that is longer than a window comes one span, from a place that its name decides: the heads of files
        (licences, imports) are unlike the rest. So there are as many documents as the tokens asked for allow; further
        spans of them come when there are no more.
        """
        further: list[tuple[Document, Iterator[Encoded]]] = []
        for document in itertools.chain(tuple(self._candidates), self._read()):
            if split_of(document.file) == split and document.key not in self._drawn:
                spans = self._spans(document)
                for encoded in itertools.islice(spans, 1):
                    self._drawn.add(document.key)
                    drawn.append((document, encoded))
                    yield encoded
                    further.append((document, spans))
        while further:
            for pair in tuple(further):
                following = next(pair[1], None)
                if following is None:
                    further.remove(pair)
                else:
                    drawn.append((pair[0], following))
                    yield following

    def _spans(self, document: Document) -> Iterator[Encoded]:
        """A text's spans of a window's length; a chat without the turns that are too many."""
        room = self._data.seq_len
        if document.chat is None:
            yield from self._encoder.spans(document, room, ORDER, "span")
        elif (encoded := self._encoder.cut_chat(document, max(room, LONGEST_CHAT))) is not None:
            yield encoded

    def _read(self) -> Iterator[Document]:
        for document in self._reading:
            if split_of(document.file) in HELD_OUT_SPLITS:
                self._candidates.append(document)
                yield document

    def _too_little(self, split: str, have: int, asked: int) -> BadInput:
        return BadInput(
            f"corpus {self.name!r} has {have} held-out tokens for {split}, {asked} asked"
            + (f" in whole windows of {self._data.seq_len}" if split == "calibration" else ""),
            hint=f"lower data.{split}_tokens or add files (whole files are held out: one is not enough)",
        )

    def _write_documents(
        self, folder: Path, tally: _Tally, found: list[tuple[Document, Encoded]], held_out: HeldOut
    ) -> None:
        write_jsonl(folder / f"{self.name}.jsonl", (_held_out_row(encoded) for _, encoded in found))
        tally.spans = len(found)
        for document in dict.fromkeys(document for document, _ in found):  # whole, where only a part was taken
            tally.add_document(document)
            held_out.add(document)

    def describe_stream(self) -> dict[str, Any]:
        """What the shards of a streamed corpus are made from; see :mod:`prosparse_core.data.stream`."""
        return {
            "source": self.source.model_dump(mode="json", exclude={"mirror"}),
            "seed": self._seed,
            "seq_len": self._data.seq_len,
            "windows_per_shard": self.source.max_tokens // self._data.stream_shards // self._data.seq_len,
            "max_shards": self._data.stream_shards,
            "num_leading": self._encoder.num_leading(is_chat=self.is_instruction),
        }

    def describe(self, share: float, train: dict[str, Any]) -> dict[str, Any]:
        """The corpus in the manifest."""
        return {
            "name": self.name,
            "kind": self.source.kind,
            "instruction": self.is_instruction,
            "weight": self.source.weight,
            "share": share,
            **({"stream": True} if self.source.stream else {}),
            "train": train,
            **self.splits,
        }


class Shard:
    """The windows of one corpus in one split: tokens, beginnings of documents, and labels where not all tokens are."""

    def __init__(self, folder: Path, name: str, seq_len: int, with_mask: bool, num_rows: int = 0) -> None:
        self._tokens = RowWriter(folder / f"{name}.tokens.npy", seq_len, np.int32, num_rows)
        self._begins = RowWriter(folder / f"{name}.begins.npy", -(-seq_len // 8), np.uint8, num_rows)
        self._mask = RowWriter(folder / f"{name}.mask.npy", seq_len, np.uint8, num_rows) if with_mask else None
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

    def sync(self) -> None:
        """See :meth:`RowWriter.sync`."""
        for writer in (self._tokens, self._begins, self._mask):
            if writer is not None:
                writer.sync()

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def _held_out_row(encoded: Encoded) -> dict[str, Any]:
    return to_row(encoded.document) | {"num_tokens": len(encoded.tokens)}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")  # ASCII, so that no character can break a line
