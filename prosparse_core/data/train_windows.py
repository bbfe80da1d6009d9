"""The training windows of one corpus on their way to disk, shard by shard: a killed preparation goes on at the next.

A shard takes whole batches of documents until it has its windows, and is packed by itself, so that all that has to be
known to go on is how many documents and windows the shards before it have: both are written down after each. Documents
before are then read again, which is fast, but not tokenized.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import Document
from prosparse_core.data.encoding import Encoders, batched
from prosparse_core.data.packing import Encoded, Window, pack_texts, pack_whole
from prosparse_core.data.shards import Shard
from prosparse_core.errors import BadInput
from prosparse_core.store import write_json

SHARD_TOKENS = 4_194_304
"""Of a shard, or one window; so much is lost of a preparation that was killed, and less than a window at its end."""
PROGRESS = ".progress"
"""Folder of what is written down; it goes when all is done."""


@dataclass
class Written:
    """What the shards on disk hold."""

    read: int = 0
    """Documents of the source."""
    windows: int = 0
    documents: int = 0
    labels: int = 0
    filler: int = 0
    held_out: int = 0
    """Documents that were left out because their file is held out."""
    duplicates: int = 0
    """Likewise because their text is."""
    ended: bool = False
    """There is no more text, or enough."""

    def add(self, window: Window) -> None:
        self.windows += 1
        self.documents += len(window.starts)
        self.labels += int(window.mask.sum())
        self.filler += window.num_filler

    def describe(self, seq_len: int) -> dict[str, Any]:
        """For the manifest."""
        tokens = self.windows * seq_len
        return {
            "documents": self.documents,
            "tokens": tokens,
            "windows": self.windows,
            "label_share": self.labels / tokens if tokens else None,
            "filler_tokens": self.filler,
            "held_out_left_out": self.held_out,
            "duplicates_of_held_out_removed": self.duplicates,
        }


class TrainWindows:
    """Whole windows of a corpus, ``max_tokens`` of them at most.

    Args:
        folder: the mixture's.
        documents: the documents of the corpus from the first on; called once.
        num_leading: see :meth:`prosparse_core.data.packing.Encoder.num_leading`.
        shard_tokens: see ``SHARD_TOKENS``; decides the windows, by where packing begins anew.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        documents: Callable[[], Iterator[Document]],
        *,
        seq_len: int,
        max_tokens: int,
        is_chat: bool,
        num_leading: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._name, self._folder, self._documents, self._seq_len = name, folder, documents, seq_len
        self._max_tokens, self._num_windows, self._is_chat = max_tokens, max_tokens // seq_len, is_chat
        self._num_leading = num_leading
        self._per_shard = max(1, shard_tokens // seq_len)
        self._record = folder / PROGRESS / f"{name}.json"
        self.written = Written()
        if self._record.is_file():
            self.written = Written(**json.loads(self._record.read_text(encoding="utf-8")))

    def write(self, encoders: Encoders) -> Iterator[int]:
        """Go on where an earlier attempt stopped, telling again and again how many tokens there are.

        Raises:
            BadInput: there is not one window of text.
        """
        written = self.written
        if not written.ended:
            rest = itertools.islice(self._documents(), written.read, None)
            before = written.read
            found = encoders.run(batched(rest, lambda count: before + count))
            shard = Shard(self._folder / "train", self._name, self._seq_len, self._is_chat, num_rows=written.windows)
            with contextlib.closing(found), shard:
                while not written.ended:
                    wanted = min(self._per_shard, self._num_windows - written.windows)
                    for window in self._windows(found, wanted):
                        shard.add(window)
                        written.add(window)
                        yield written.windows * self._seq_len
                    written.ended = written.ended or written.windows >= self._num_windows
                    shard.sync()
                    self._record.parent.mkdir(exist_ok=True)
                    write_json(self._record, asdict(written))
        if not written.windows:
            raise BadInput(
                f"corpus {self._name!r} has fewer training tokens than one window of seq_len={self._seq_len}"
                f" (max_tokens={self._max_tokens})",
                hint="add files, raise max_tokens or lower data.seq_len",
            )

    def _windows(self, found: Iterator[Any], wanted: int) -> Iterator[Window]:
        """Those of the next shard: ``wanted`` and what its last batch adds, but never more than all."""
        start = self.written.windows

        def encoded() -> Iterator[Encoded]:
            while self.written.windows - start < wanted:
                batch = next(found, None)
                if batch is None:
                    self.written.ended = True
                    return
                self.written.read = batch.after
                self.written.held_out += batch.num_held_out
                self.written.duplicates += batch.num_duplicates
                yield from batch.encoded

        pack: Callable[[Iterable[Encoded], int, int], Iterator[Window]] = pack_whole if self._is_chat else pack_texts
        return itertools.islice(pack(encoded(), self._seq_len, self._num_leading), self._num_windows - start)
