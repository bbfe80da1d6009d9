"""What a source yields: documents, each of a file that is held out as a whole; and hashes that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT_PCT = 8
"""Percent of all files that *may* be held out for each of the two held-out splits; see :func:`split_of`."""
SHORT_CHARS = 100
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: ``role`` is user, assistant or system; ``content`` is stripped and not empty."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text, or what was said in a chat: an answer to a ``prompt``, or the ``turns`` of a conversation.

    Of a chat, ``text`` is what the loss is on: the answer, or all assistant turns together.
    """

    id: str
    file: str
    """What is held out as a whole: a file, a distribution, a row, all conversations that open with one question."""
    text: str
    prompt: str | None = None
    turns: tuple[Turn, ...] | None = None

    @property
    def chat(self) -> tuple[Turn, ...] | None:
        """The turns, also of a prompt and its answer; None for a text."""
        if self.turns is None and self.prompt is not None:
            return (Turn(USER, self.prompt), Turn(ASSISTANT, self.text))
        return self.turns

    @property
    def num_chars(self) -> int:
        """Of all that becomes tokens."""
        return len(self.text) if self.chat is None else sum(len(turn.content) for turn in self.chat)

    @property
    def key(self) -> bytes:
        """Equal for documents that are the same but for white space. Short answers count only with what was asked."""
        text = " ".join(self.text.split())
        if self.chat is not None and len(text) < SHORT_CHARS:
            asked = (" ".join(turn.content.split()) for turn in self.chat if turn.role != ASSISTANT)
            text = "\0".join([*asked, text])
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def conversation(id: str, file: str, turns: Iterable[Turn]) -> Document:
    """A document of several turns, at least one of them the assistant's."""
    turns = tuple(turns)
    assert any(turn.role == ASSISTANT for turn in turns)
    return Document(id, file, "\n".join(t.content for t in turns if t.role == ASSISTANT), turns=turns)


def to_row(document: Document) -> dict[str, Any]:
    """A held-out document as plain values; :func:`from_row` reads them."""
    row: dict[str, Any] = {"id": document.id, "file": document.file, "text": document.text}
    if document.prompt is not None:
        row["prompt"] = document.prompt
    if document.turns is not None:
        row["messages"] = [{"role": turn.role, "content": turn.content} for turn in document.turns]
    return row


def from_row(row: Mapping[str, Any]) -> Document:
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in row.get("messages") or ()) or None
    return Document(row["id"], row["file"], row["text"], row.get("prompt"), turns)


def stable_hash(*parts: object) -> int:
    """64 bits of the parts; the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def row_file(unit: str) -> str:
    """The file that a row counts as, known by a text of it: equal up to white space is the same file."""
    return f"row:{stable_hash(' '.join(unit.split())):016x}"


def split_of(file: str) -> str:
    """``train``, or the one held-out split the file may be drawn for: a property of its name, the same in every corpus.

    Only as many files are held out as the splits need tokens (:class:`prosparse_core.data.held_out.HeldOut`); the
    others of ``calibration`` and ``evaluation`` are trained on like those of ``train``.
    """
    place = stable_hash("split", file) % 100
    if place < HELD_OUT_PCT:
        return "evaluation"
    return "calibration" if place < 2 * HELD_OUT_PCT else "train"


def shuffled(names: Iterable[str], seed: object) -> list[str]:
    """The names in an order that depends on the seed and on nothing else."""
    return sorted(names, key=lambda name: (stable_hash(seed, name), name))
