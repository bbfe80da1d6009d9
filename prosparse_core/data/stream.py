"""A corpus that does not fit on disk, as numbered shards of windows, each a pure function of where it begins.

Documents come file by file in a shuffled order of the files (of the hub: from a few files in turns), one epoch after
the other. A shard takes whole batches of documents until it has its windows; where the next one begins is written
down, so that any shard that was once made can be made again without those before it. Run as a program this prepares
shards ahead of their use.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import Document
from prosparse_core.data.encoding import BATCH_CHARS, EncodedBatch, Encoders, batched
from prosparse_core.data.held_out import HELD_OUT, HeldOut
from prosparse_core.data.packing import Encoded, pack_texts, pack_whole
from prosparse_core.data.processes import num_processes
from prosparse_core.data.shards import Shard
from prosparse_core.data.sources import open_hub_rows, read_files
from prosparse_core.distributed.lifeline import end_with_parent
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Source
from prosparse_core.store import write_json

DESCRIPTION = "streams.json"
TOKENIZER = "tokenizer"
POLL_S = 0.1
FAILURE = "failure.json"
MIRRORS = "mirrors.json"
NICENESS = 10
"""Cores are for training first; when it waits for a shard, they are free."""


@dataclass(frozen=True)
class ShardState:
    """Shard ``number`` of a corpus holds windows ``start`` to ``start + windows``."""

    number: int
    start: int
    windows: int
    begins: dict[str, Any] | None
    """The position of its first document; None: the beginning of the source."""
    ends: dict[str, Any]
    """The position after its last document."""

    @property
    def end(self) -> int:
        return self.start + self.windows


class DocumentStream:
    """The documents of a source from a position on, endlessly; ``position`` is that after the last one given."""

    def __init__(self, source: Source, seed: int, position: dict[str, Any] | None) -> None:
        self._source, self._seed = source, seed
        self._epoch: int = position["epoch"] if position else 0
        self._within: Any = position["within"] if position else None
        self._hub: Any = None

    @property
    def position(self) -> dict[str, Any]:
        within = self._within if self._hub is None else self._hub.state_dict()
        return {"epoch": self._epoch, "within": within}

    def __iter__(self) -> Iterator[Document]:
        while True:
            found = False
            for document in self._hub_epoch() if self._source.kind == "hub" else self._files_epoch():
                found = True
                yield document
            if not found and self._within is None:
                raise BadInput(f"source {self._source.name!r} has no text", hint="check its path and columns")
            self._epoch, self._within, self._hub = self._epoch + 1, None, None

    def _files_epoch(self) -> Iterator[Document]:
        for place, document in read_files(self._source, f"{self._seed} epoch {self._epoch}", self._within):
            self._within = list(place)
            yield document

    def _hub_epoch(self) -> Iterator[Document]:
        self._hub, documents = open_hub_rows(self._source, f"{self._seed} epoch {self._epoch}", self._within)
        yield from documents


class Maker:
    """Makes the shards of one corpus in order, from a known state on.

    Args:
        description: of the corpus, as :func:`describe` wrote it.
        encoders: at work, with what is held out.
        index: folder of the states, which outlives the shards.
        scratch: folder of the shards.
    """

    def __init__(self, description: dict[str, Any], encoders: Encoders, index: Path, scratch: Path) -> None:
        self._source = Source.model_validate(description["source"])
        self._about, self._encoders = description, encoders
        self._index, self._scratch = index, scratch
        self._ahead: Generator[EncodedBatch] | None = None
        self._at: dict[str, Any] | None = None
        """Where the batch after the last one that was used begins; some after it may have been read."""
        self.name = self._source.name

    def make(self, number: int, start: int, position: dict[str, Any] | None, needed: int) -> ShardState:
        """One shard and its state; the shard itself is left out when it ends before window ``needed``."""
        seq_len, wanted = self._about["seq_len"], self._about["windows_per_shard"]
        with_mask = self._source.is_chat
        pack = pack_whole if with_mask else pack_texts
        name = f".{shard_name(self.name, number)}.{os.getpid()}"
        ahead = self._open(position)
        count = 0

        def encoded() -> Iterator[Encoded]:
            while count < wanted:
                batch = next(ahead)
                if count == 0 and batch.after["epoch"] > (position["epoch"] if position else 0) + 1:
                    raise BadInput(
                        f"source {self.name!r} has fewer training tokens than one window of seq_len={seq_len}",
                        hint="add files or lower data.seq_len",
                    )
                self._at = batch.after
                yield from batch.encoded

        with Shard(self._scratch, name, seq_len, with_mask) as shard:
            for window in pack(encoded(), seq_len, self._about["num_leading"]):
                shard.add(window)
                count += 1
        assert self._at is not None
        state = ShardState(number, start, count, position, self._at)
        write_json(self._index / f"{shard_name(self.name, number)}.json", asdict(state))
        for kind in ("mask", "begins", "tokens"):  # a reader looks for the tokens
            made = self._scratch / f"{name}.{kind}.npy"
            if made.exists():
                if state.end > needed:
                    made.replace(self._scratch / f"{shard_name(self.name, number)}.{kind}.npy")
                else:
                    made.unlink()
        return state

    def _open(self, position: dict[str, Any] | None) -> Generator[EncodedBatch]:
        """The batches from a position on: those that were read ahead, if it is where the last shard ended."""
        if self._ahead is None or position != self._at:
            if self._ahead is not None:
                self._ahead.close()
            stream = DocumentStream(self._source, self._about["seed"], position)
            # no batch much larger than the shard it goes to
            max_chars = min(BATCH_CHARS, self._about["windows_per_shard"] * self._about["seq_len"])
            self._ahead = self._encoders.run(batched(iter(stream), lambda _: stream.position, max_chars))
            self._at = position
        return self._ahead


def shard_name(corpus: str, number: int) -> str:
    return f"{corpus}-{number:06d}"


def states(index: Path, corpus: str) -> list[ShardState]:
    """All that are known, from the first shard on."""
    found: list[ShardState] = []
    for number in itertools.count():
        path = index / f"{shard_name(corpus, number)}.json"
        if not path.is_file():
            return found
        found.append(ShardState(**json.loads(path.read_text(encoding="utf-8"))))
    raise AssertionError


def prepare_ahead(mixture: Path, index: Path, scratch: Path, first: dict[str, int], processes: int | None) -> None:
    """Keep shards ready from window ``first`` of each corpus on, as many as the description allows; endless.

    Args:
        processes: that tokenize; None: the cores, where a shard is large enough.
    """
    from prosparse_core.variants import load_tokenizer

    descriptions = _descriptions(mixture, index)
    shard_tokens = max(about["windows_per_shard"] * about["seq_len"] for about in descriptions.values())
    held_out = HeldOut.from_plain(json.loads((mixture / HELD_OUT).read_text(encoding="utf-8")))
    with Encoders(load_tokenizer(mixture / TOKENIZER), held_out, num_processes(processes, shard_tokens)) as encoders:
        makers = {name: Maker(descriptions[name], encoders, index, scratch) for name in first}
        _keep_ready(makers, descriptions, index, scratch, first)


def index_of(mixture: Path) -> Path:
    """Where the states of a mixture's shards are kept: beside the artifacts, for later stages and runs."""
    return mixture.parents[1] / ".streams" / mixture.name


def tell_mirrors(mixture: Path, sources: Iterable[Source]) -> None:
    """Say where the mirrors of streamed sources lie now: what an artifact holds is the same wherever they lie."""
    mirrors = {s.name: str(Path(s.mirror).expanduser().resolve()) for s in sources if s.stream and s.mirror}
    if mirrors:
        index_of(mixture).mkdir(parents=True, exist_ok=True)
        write_json(index_of(mixture) / MIRRORS, mirrors)


def _descriptions(mixture: Path, index: Path) -> dict[str, dict[str, Any]]:
    """Of every streamed corpus, with the place of its mirror, if it has one."""
    found: dict[str, dict[str, Any]] = json.loads((mixture / DESCRIPTION).read_text(encoding="utf-8"))
    told = index / MIRRORS
    for name, mirror in (json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}).items():
        if name in found:
            found[name]["source"]["mirror"] = mirror
    return found


def _keep_ready(
    makers: dict[str, Maker],
    descriptions: dict[str, dict[str, Any]],
    index: Path,
    scratch: Path,
    first: dict[str, int],
) -> None:
    following = {name: _before(states(index, name), window) for name, window in first.items()}
    while True:
        idle = True
        for name, maker in makers.items():
            if len(list(scratch.glob(f"{name}-[0-9]*.tokens.npy"))) >= descriptions[name]["max_shards"]:
                continue
            number, start, position = following[name]
            known = states(index, name)
            there = (scratch / f"{shard_name(name, number)}.tokens.npy").is_file()
            if number < len(known) and (there or known[number].end <= first[name]):
                state = known[number]
            else:
                state = maker.make(number, start, position, first[name])
            following[name] = (number + 1, state.end, state.ends)
            idle = False
        if idle:
            time.sleep(POLL_S)


def _before(known: list[ShardState], window: int) -> tuple[int, int, dict[str, Any] | None]:
    """Number, start and position of the shard that holds a window, or of the first unknown one."""
    for state in known:
        if window < state.end:
            return state.number, state.start, state.begins
    return (len(known), known[-1].end, known[-1].ends) if known else (0, 0, None)


def main(arguments: list[str]) -> int:
    """The preparing process; what goes wrong is left in the scratch folder for the reader."""
    parent, mixture, index, scratch, first, processes = arguments
    end_with_parent(int(parent))
    os.nice(NICENESS)
    try:
        prepare_ahead(Path(mixture), Path(index), Path(scratch), json.loads(first), json.loads(processes))
    except BaseException as error:
        from prosparse_core.distributed.trainer import failure

        write_json(Path(scratch) / FAILURE, failure(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
