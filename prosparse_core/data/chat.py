"""Conversations as one text: written by the tokenizer's chat template, with the place of every assistant turn in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prosparse_core.data.documents import ASSISTANT, SYSTEM, USER, Document, Turn
from prosparse_core.errors import BadInput

PLAIN_HEADS = {SYSTEM: "", USER: "### Instruction:\n", ASSISTANT: "### Response:\n"}
"""Before each turn, for a tokenizer without a chat template."""
DATE = "26 Jul 2024"
"""Templates that write today's date take it from here: the same recipe gives the same tokens every day."""


@dataclass(frozen=True)
class Said:
    """An assistant turn in a rendered text: its content is ``text[first:last]``, what ends it ``text[last:end]``."""

    first: int
    last: int
    end: int


class ChatFormat:
    """How chats are written: as ``pieces`` around the contents, which depend on the roles alone.

    Args:
        turn_end: what ends an assistant's turn where there is no chat template and another turn follows.
    """

    def __init__(self, tokenizer: Any, turn_end: str) -> None:
        self._tokenizer, self._turn_end = tokenizer, turn_end
        self.uses_template = bool(tokenizer.chat_template)
        self._pieces: dict[tuple[str, ...], tuple[str, ...]] = {}

    def pieces(self, roles: tuple[str, ...], where: str = "a prompt and its answer") -> tuple[str, ...]:
        """What stands before the first content, between each and the next, and after the last: one more than roles.

        Raises:
            BadInput: the chat template refuses these roles, or does not write every content as it is, in order.
        """
        if roles not in self._pieces:
            self._pieces[roles] = self._by_template(roles, where) if self.uses_template else self._plain(roles)
        return self._pieces[roles]

    def render(self, document: Document) -> tuple[str, list[Said]]:
        """The text of a chat, and its assistant turns; exactly what the template writes.

        Raises:
            BadInput: see :meth:`pieces`; or the template changes the contents.
        """
        turns = document.chat
        assert turns is not None
        where = f"the conversation {document.id} (that begins {turns[0].content[:40]!r})" if document.turns else None
        pieces = self.pieces(tuple(turn.role for turn in turns), *([where] if where else []))
        ending = pieces[-1] if self.uses_template else self._turn_end
        text, said = pieces[0], []
        for turn, after in zip(turns, pieces[1:], strict=True):
            first, last = len(text), len(text) + len(turn.content)
            text += turn.content + after
            if turn.role == ASSISTANT:
                said.append(Said(first, last, last + _common(after, ending)))
        if where and self.uses_template and self._apply(turns, where) != text:
            raise BadInput(
                f"the tokenizer's chat template does not write the turns of {where} as they are",
                hint="it reads something into their text: leave this conversation out, or change the text",
            )
        return text, said

    def _plain(self, roles: Sequence[str]) -> tuple[str, ...]:
        pieces = []
        for before, role in zip(("", *roles), roles, strict=False):
            end = (self._turn_end or "\n\n") if before == ASSISTANT else "\n\n" if before else ""
            pieces.append(end + PLAIN_HEADS[role])
        return (*pieces, "")

    def _by_template(self, roles: Sequence[str], where: str) -> tuple[str, ...]:
        marks = [f"\u27ea{i}\u27eb" for i in range(len(roles))]
        text = self._apply([Turn(role, mark) for role, mark in zip(roles, marks, strict=True)], where)
        pieces, rest = [], text
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                break
            pieces.append(before)
        pieces.append(rest)
        if len(pieces) <= len(marks) or any(mark in piece for mark in marks for piece in pieces):
            raise BadInput(
                f"the tokenizer's chat template does not write the turns of {where} in their order, once each "
                f"({', '.join(roles)})",
                hint="use a text source (column or template) instead of an instruction source",
            )
        return tuple(pieces)

    def _apply(self, turns: Sequence[Turn], where: str) -> str:
        import jinja2

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadInput(
                f"the tokenizer's chat template refuses {where} ({', '.join(turn.role for turn in turns)}): {error}",
                hint="leave out such conversations, or give the model's tokenizer a template that takes them",
            ) from error
        return text


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
