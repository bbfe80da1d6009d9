"""From documents to token windows of a fixed length: one encoding for training, calibration and evaluation."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from prosparse_core.data.chat import ChatFormat, Said
from prosparse_core.data.documents import ASSISTANT, USER, Document, conversation, stable_hash
from prosparse_core.data.separator import separator_of, special_tokens
from prosparse_core.errors import BadInput, ProSparseError

LOOKAHEAD = 64


@dataclass(frozen=True)
class Encoded:
    """A document as the model sees it: ``tokens`` int32 [n], ``mask`` uint8 [n], 1 where the token is a label."""

    document: Document
    tokens: np.ndarray
    mask: np.ndarray


class Encoder:
    """Documents to tokens, in the one format of a tokenizer.

    A text is put between the ``prefix`` and the ``suffix`` of the model's document separator
    (:mod:`prosparse_core.data.separator`). A chat is written by the tokenizer's chat template, or plainly between the
    same prefix and suffix (:mod:`prosparse_core.data.chat`); its labels are what the assistant says and the token that
    ends each such turn.

    Raises:
        BadInput: the tokenizer has neither BOS nor EOS, so documents cannot be told apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.separator = separator_of(tokenizer)
        self.prefix, self.suffix = list(self.separator.prefix), list(self.separator.suffix)
        self._format = ChatFormat(tokenizer, "".join(tokenizer.convert_ids_to_tokens(self.suffix)))
        self._special = special_tokens(tokenizer)

    @property
    def description(self) -> dict[str, Any]:
        """For the manifest: what stands around documents."""
        return {
            "vocab_size": len(self._tokenizer),
            "bos_token_id": self._tokenizer.bos_token_id,
            "eos_token_id": self._tokenizer.eos_token_id,
            "document_prefix": self.prefix,
            "document_suffix": self.suffix,
            "document_separator": self._tokenizer.convert_ids_to_tokens(self.separator.before),
            "instruction_format": "chat_template" if self._format.uses_template else "plain",
        }

    def chat_format(self) -> tuple[str, str, str]:
        """What stands before a prompt, between prompt and answer, and after the answer.

        Raises:
            BadInput: the chat template refuses a user turn with an answer, or does not write both as they are.
        """
        before, between, after = self._format.pieces((USER, ASSISTANT))
        return before, between, after

    def lead(self, *, is_chat: bool) -> list[int]:
        """What precedes a document that nothing else precedes, as another document would in training.

        Nothing where the document's own tokens say it: a chat template writes its own beginning.
        """
        return [] if is_chat and self._format.uses_template else [self.separator.before]

    def written(self, document: Document) -> str:
        """The text of a chat, as the model reads it."""
        return self._format.render(document)[0]

    def num_leading(self, *, is_chat: bool) -> int:
        """How many tokens of the end of a document the next one begins with, where documents are kept apart.

        Where a text has nothing of its own before it, what separates it from the text before says that it begins: it is
        the last token to be predicted of the one, and the first that the other sees. A chat template writes its own
        beginning.
        """
        return 0 if self.prefix or (is_chat and self._format.uses_template) else len(self.suffix)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """The documents in their order."""
        texts = [d for d in documents if d.chat is None]
        chats = [d for d in documents if d.chat is not None]
        found = {id(d): e for d, e in zip(texts, self._encode_texts(texts), strict=True)}
        found.update({id(d): e for d, e in zip(chats, self._encode_chats(chats), strict=True)})
        return [found[id(d)] for d in documents]

    def spans(self, document: Document, max_tokens: int, *key: object) -> Iterator[Encoded]:
        """The spans of a text that have at most ``max_tokens`` tokens, in an order shuffled by the key; lazily.

        A text with no more tokens is one span. A longer one is cut into as many equal parts as it has that many tokens,
        and of each part comes the beginning; parts and spans end with a line or else a word, where there is one near.
        """
        assert document.chat is None
        encoded, text = self.encode([document])[0], document.text
        parts = len(encoded.tokens) // max_tokens
        if len(encoded.tokens) <= max_tokens:
            yield encoded
            return
        length = len(text) / parts
        edges = [_boundary(text, int((i - 0.25) * length), int(i * length)) for i in range(1, parts)]
        edges = [0, *edges, len(text)]
        for part in sorted(range(parts), key=lambda i: stable_hash(*key, document.id, document.file, i)):
            if edges[part] < edges[part + 1]:
                yield self._cut(Document(document.id, document.file, text[edges[part] : edges[part + 1]]), max_tokens)

    def _cut(self, document: Document, max_tokens: int) -> Encoded:
        """The beginning of a text that has at most ``max_tokens`` tokens."""
        encoded = self.encode([document])[0]
        while len(encoded.tokens) > max_tokens:
            text = encoded.document.text
            end = max(1, len(text) * max_tokens // (len(encoded.tokens) + 1))
            end = _boundary(text, end // 2, end)
            encoded = self.encode([Document(document.id, document.file, text[:end])])[0]
        return encoded

    def cut_chat(self, document: Document, max_tokens: int) -> Encoded | None:
        """The chat, without as many of its last turns as keep it from having at most ``max_tokens`` tokens.

        It still ends with a turn of the assistant. None when not even the first such turn fits.
        """
        assert document.chat is not None
        encoded = self.encode([document])[0]
        while len(encoded.tokens) > max_tokens:
            turns = list((encoded.document.turns or ())[:-1])
            while turns and turns[-1].role != ASSISTANT:
                turns.pop()
            if not turns:
                return None
            encoded = self.encode([conversation(document.id, document.file, turns)])[0]
        return encoded

    def _encode_texts(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        if not documents:
            return
        texts = [d.text for d in documents]
        found = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for document, ids in zip(documents, found["input_ids"], strict=True):
            tokens = np.array([*self.prefix, *ids, *self.suffix], dtype=np.int32)
            yield Encoded(document, tokens, np.ones(len(tokens), dtype=np.uint8))

    def _encode_chats(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        if not documents:
            return
        if not self._tokenizer.is_fast:
            raise BadInput(
                "an instruction corpus needs a fast tokenizer, which says where the answer's tokens are",
                hint="add tokenizer.json to the model's folder",
            )
        rendered = [self._format.render(d) for d in documents]
        found = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for document, (_, said), ids, offsets in zip(
            documents, rendered, found["input_ids"], found["offset_mapping"], strict=True
        ):
            tokens = np.array(ids, dtype=np.int32)
            mask, is_ended = self._labels(tokens, np.array(offsets, dtype=np.int64).reshape(-1, 2), said)
            before, after = ([] if self._format.uses_template else self.prefix), ([] if is_ended else self.suffix)
            yield Encoded(
                document,
                np.array([*before, *ids, *after], dtype=np.int32),
                np.concatenate([np.zeros(len(before)), mask, np.ones(len(after))]).astype(np.uint8),
            )

    def _labels(self, tokens: np.ndarray, offsets: np.ndarray, said: Sequence[Said]) -> tuple[np.ndarray, bool]:
        """1 for every token of an assistant turn, and of what ends it up to the first special token there, if any; and
        whether the last turn has such an end. A token that reaches across the border of a turn belongs to it.
        """
        starts, ends = offsets[:, 0], offsets[:, 1]
        mask, is_ended = np.zeros(len(tokens), dtype=np.uint8), False
        for turn in said:
            mask[(ends > turn.first) & (starts < turn.last)] = 1
            ending = np.flatnonzero((starts >= turn.last) & (starts < turn.end))
            stop = next((i for i in ending if tokens[i] in self._special), None)
            is_ended = stop is not None
            if stop is not None:
                mask[ending[0] : stop + 1] = 1
        return mask, is_ended


def _boundary(text: str, first: int, last: int) -> int:
    """The last beginning of a line behind ``first`` and up to ``last``, else of a word, else ``last`` itself."""
    return next((at + 1 for mark in "\n " if (at := text.rfind(mark, first, last)) >= 0), last)


@dataclass(frozen=True)
class Window:
    """``tokens`` int32 [seq_len] and ``mask`` uint8 [seq_len]; ``starts``: the documents that begin in it.

    ``begins`` uint8 [seq_len] is 1 where another document begins, or what is left of one: at the first place always.
    """

    tokens: np.ndarray
    mask: np.ndarray
    begins: np.ndarray
    starts: list[Document]
    num_filler: int = 0
    """Tokens without a label that repeat the beginning of another document to fill the window."""


def pack_texts(encoded: Iterable[Encoded], seq_len: int, num_leading: int = 0) -> Iterator[Window]:
    """Documents one after the other, cut every ``seq_len`` tokens; the incomplete end is left out.

    Args:
        num_leading: see :meth:`Encoder.num_leading`.
    """
    tokens, mask, begins = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)
    starts: list[Document] = []
    for item in encoded:
        begin = max(0, len(tokens) - num_leading)
        tokens, mask = np.concatenate([tokens, item.tokens]), np.concatenate([mask, item.mask])
        begins = np.concatenate([begins, np.zeros(len(item.tokens), dtype=np.uint8)])
        begins[begin] = 1
        starts.append(item.document)
        whole = len(tokens) // seq_len * seq_len
        for at in range(0, whole, seq_len):
            begins[at] = 1
            window = slice(at, at + seq_len)
            yield Window(tokens[window], mask[window], begins[window], starts)
            starts = []
        tokens, mask, begins = tokens[whole:], mask[whole:], begins[whole:]


def pack_whole(encoded: Iterable[Encoded], seq_len: int, num_leading: int = 0) -> Iterator[Window]:
    """Documents that stay whole: into each window goes the first of the next ``LOOKAHEAD`` documents that still fits.

    What room remains is filled with the beginning of the next document, without labels; that document follows whole.
    Only a document longer than a window is cut: it starts a window and continues in the following ones. A window with
    nothing to predict (all of it a long prompt) is left out, since its loss would be 0/0; so is the incomplete end.
    """
    source = iter(encoded)
    waiting: deque[Encoded] = deque()
    rest: Encoded | None = None
    starts: list[Document] = []
    while True:
        parts: list[Encoded] = []
        num_filler, room = 0, seq_len
        while room:
            if rest is None:
                while len(waiting) < LOOKAHEAD and (item := next(source, None)) is not None:
                    waiting.append(item)
                if not waiting:
                    return
                # a window begins with the document that waits longest, whatever its length: none is put off for ever
                fits = (i for i, item in enumerate(waiting) if len(item.tokens) <= room or room == seq_len)
                place = next(fits, None)
                if place is None:
                    filler = waiting[0]
                    parts.append(Encoded(filler.document, filler.tokens[:room], np.zeros(room, dtype=np.uint8)))
                    num_filler, room = room, 0
                    continue
                rest = waiting[place]
                del waiting[place]
                starts.append(rest.document)
            parts.append(Encoded(rest.document, rest.tokens[:room], rest.mask[:room]))
            left = Encoded(rest.document, rest.tokens[room:], rest.mask[room:])
            room -= len(parts[-1].tokens)
            rest = left if len(left.tokens) else None
        mask = np.concatenate([part.mask for part in parts])
        if mask[1:].any():  # the first token of a window has nothing before it to be predicted from
            begins = np.zeros(seq_len, dtype=np.uint8)
            places = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])])
            begins[np.maximum(places - num_leading, 0)] = 1
            yield Window(np.concatenate([part.tokens for part in parts]), mask, begins, starts, num_filler)
            starts = []


class RowWriter:
    """Writes a ``.npy`` file of shape [rows, columns] row by row, without knowing how many there will be.

    Args:
        num_rows: keep so many that are there and go on after them; what follows these is cut off.

    Raises:
        ProSparseError: there are fewer.
    """

    def __init__(self, path: Path, columns: int, dtype: type[np.generic], num_rows: int = 0) -> None:
        self._path, self._columns, self._dtype = path, columns, np.dtype(dtype)
        self.num_rows = num_rows

    def __enter__(self) -> RowWriter:
        self._handle: IO[bytes] = self._path.open("r+b" if self.num_rows else "wb")
        self._data_at = self._write_header()
        end = self._data_at + self.num_rows * self._columns * self._dtype.itemsize
        if self._handle.seek(0, os.SEEK_END) < end:
            self._handle.close()
            raise ProSparseError(f"{self._path} has fewer than {self.num_rows} rows", hint="delete its folder")
        self._handle.truncate(end)
        self._handle.seek(end)
        return self

    def sync(self) -> None:
        """All rows so far are on the disk."""
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def add(self, row: np.ndarray) -> None:
        assert row.shape == (self._columns,)
        self._handle.write(row.astype(self._dtype).tobytes())
        self.num_rows += 1

    def _write_header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.num_rows, self._columns)}
        np.lib.format.write_array_header_1_0(self._handle, header)
        return self._handle.tell()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._handle.seek(0)
            # numpy leaves room for the number of rows to grow, so that the header keeps its length
            end = self._write_header()
            assert end == self._data_at
        finally:
            self._handle.close()
