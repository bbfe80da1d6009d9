"""Documents to tokens in several processes, in their order: the same tokens whatever the number of processes.

The cut lies between batches of documents, which are a function of the documents alone. One process reads and packs;
the others (``prosparse_core.data.encoding_worker``) compare with what is held out and tokenize.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core import errors
from prosparse_core.data.documents import Document
from prosparse_core.data.held_out import HeldOut
from prosparse_core.data.packing import Encoded, Encoder
from prosparse_core.errors import ProSparseError

BATCH_DOCUMENTS, BATCH_CHARS = 64, 400_000
"""What makes one call of the tokenizer."""
IN_FLIGHT = 2
"""Batches a process has at a time: one to work on, one waiting."""
Found = tuple[list[int], list[tuple[np.ndarray, np.ndarray | None]], int, int]
"""Of a batch: places of the documents that are trained on, their tokens and masks (None: all labels), and how many were
left out as held out and as duplicates."""


@dataclass(frozen=True)
class Batch:
    """Documents that were read together."""

    documents: list[Document]
    after: Any
    """Where reading goes on after them."""


@dataclass(frozen=True)
class EncodedBatch:
    """What training sees of a batch, and how much it does not."""

    encoded: list[Encoded]
    after: Any
    num_held_out: int
    num_duplicates: int


def batched(
    documents: Iterator[Document], position: Callable[[int], Any], max_chars: int = BATCH_CHARS
) -> Iterator[Batch]:
    """Batches for the tokenizer; their cuts are a function of the documents alone.

    Args:
        position: where reading stands, called after each batch with the number of documents so far.
    """
    count = 0
    while True:
        batch, chars = [], 0
        for document in documents:
            batch.append(document)
            chars += document.num_chars
            if len(batch) >= BATCH_DOCUMENTS or chars >= max_chars:
                break
        if not batch:
            return
        count += len(batch)
        yield Batch(batch, position(count))


def encode_batch(encoder: Encoder, held_out: HeldOut, documents: list[Document]) -> Found:
    """What every process does with a batch."""
    verdicts = [held_out.verdict(document) for document in documents]
    places = [i for i, verdict in enumerate(verdicts) if verdict == "train"]
    encoded = encoder.encode([documents[i] for i in places])
    arrays = [(e.tokens, None if e.mask.all() else e.mask) for e in encoded]
    return places, arrays, verdicts.count("held out"), verdicts.count("duplicate")


class Encoders:
    """Tokenizers at work: in this process, or in ``processes`` others, which end with this one.

    Use as a context manager, from one thread.
    """

    def __init__(self, tokenizer: Any, held_out: HeldOut, processes: int = 1) -> None:
        self._tokenizer, self._held_out = tokenizer, held_out
        self._encoder = Encoder(tokenizer)
        self._workers: list[_Worker] = []
        self._num = processes if processes > 1 else 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Encoders:
        if self._num:
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prosparse-tokenizer-")))
                self._tokenizer.save_pretrained(folder)
                self._workers = [stack.enter_context(_Worker(number)) for number in range(self._num)]
                begun = [(worker, worker.send((str(folder), self._held_out.to_plain()))) for worker in self._workers]
                for worker, ticket in begun:
                    worker.receive(ticket)  # it has read the tokenizer
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._workers = []
        self._stack.close()

    def run(self, batches: Iterable[Batch]) -> Generator[EncodedBatch]:
        """Every batch in its order; some are read ahead, but none twice. Several may run in turns.

        Raises:
            ProSparseError: what a process raised, or that one is gone.
        """
        if not self._workers:
            for batch in batches:
                yield _put_together(batch, encode_batch(self._encoder, self._held_out, batch.documents))
            return
        source, turns = _ending(batches), itertools.cycle(self._workers)
        waiting: deque[tuple[_Worker, int, Batch]] = deque()
        end: Exception | None = None
        try:
            while True:
                while len(waiting) < IN_FLIGHT * len(self._workers) and end is None:
                    following = next(source)
                    if isinstance(following, Exception):
                        end = following
                        break
                    worker = next(turns)
                    waiting.append((worker, worker.send(following.documents), following))
                if not waiting:
                    break
                worker, ticket, batch = waiting.popleft()
                yield _put_together(batch, worker.receive(ticket))
        finally:
            for worker, ticket, _ in waiting:
                with contextlib.suppress(ProSparseError):  # nobody asks for these any more
                    worker.receive(ticket)
        if end is not None and not isinstance(end, StopIteration):
            raise end


def _ending(batches: Iterable[Batch]) -> Iterator[Batch | Exception]:
    """The batches, and what ended them: an error in what is read ahead counts when all before it was used."""
    source = iter(batches)
    while True:
        try:
            yield next(source)
        except Exception as error:
            yield error
            return


def _put_together(batch: Batch, found: Found) -> EncodedBatch:
    places, arrays, num_held_out, num_duplicates = found
    encoded = [
        Encoded(batch.documents[i], tokens, np.ones(len(tokens), dtype=np.uint8) if mask is None else mask)
        for i, (tokens, mask) in zip(places, arrays, strict=True)
    ]
    return EncodedBatch(encoded, batch.after, num_held_out, num_duplicates)


class _Worker:
    """One process, spoken to over its pipes."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._sent = self._answered = 0
        self._answers: dict[int, Any] = {}

    def __enter__(self) -> _Worker:
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "TOKENIZERS_PARALLELISM": "false",  # a core each
            "TRANSFORMERS_VERBOSITY": "error",
        }
        # A program of its own: a fork of a process with torch's threads may hang.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prosparse_core.data.encoding_worker", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()

    def send(self, work: object) -> int:
        """Give it work; returns what to ask for the answer with."""
        try:
            pickle.dump(work, self._in, protocol=pickle.HIGHEST_PROTOCOL)
            self._in.flush()
        except BrokenPipeError as error:
            raise self._gone() from error
        self._sent += 1
        return self._sent

    def receive(self, ticket: int) -> Any:
        """The answer, once; answers come in the order of the work, and those of others are kept for them."""
        while self._answered < ticket:
            try:
                answer = pickle.load(self._out)
            except (EOFError, ValueError, pickle.UnpicklingError) as error:  # ValueError: the pipe is closed
                raise self._gone() from error
            self._answered += 1
            self._answers[self._answered] = answer
        found = self._answers.pop(ticket)
        if not isinstance(found, dict):
            return found
        kind = getattr(errors, found["type"], None)
        if kind is not None:
            raise kind(found["message"], hint=found["hint"])
        raise ProSparseError(f"preparing the data failed: {found['type']}: {found['message']}")

    def _gone(self) -> ProSparseError:
        code = self._process.wait()
        return ProSparseError(
            f"process {self._number} of those that prepare the data ended with code {code}",
            hint="run the same command again: it goes on from the last shard; "
            "a smaller runtime.data_processes needs less memory",
        )
