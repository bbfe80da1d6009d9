"""From a row to a document, by the source's column, templates or list of turns."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from prosparse_core.data.conversations import turns_of
from prosparse_core.data.documents import USER, Document, conversation, row_file
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Source

LISTS = "a list of turns is read by messages: COLUMN (and turns: role/content, from/value or alternating)"


class Renderer:
    """Turns a row into a document by the source's form.

    Raises:
        BadInput: a template that does not name columns.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._fields = {
            key: self._parse(key, template)
            for key in ("template", "prompt", "answer")
            if (template := getattr(source, key)) is not None
        }
        named = [name for names in self._fields.values() for name in names]
        self.columns: list[str] = sorted(set(named)) if self._fields else [source.messages or source.column]

    def _parse(self, key: str, template: str) -> list[str]:
        where = f"source {self._source.name!r}: {key}={template!r}"
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise BadInput(f"{where}: {error}", hint="write a literal brace twice: {{ or }}") from error
        if not fields or not all(field.isidentifier() for field in fields):
            hint = "only plain names are allowed" + (f"; {LISTS}" if any("[" in field for field in fields) else "")
            raise BadInput(f"{where}: needs columns in braces, such as {{text}}", hint=hint)
        return fields

    def check(self, columns: Sequence[str], *, where: str) -> None:
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise BadInput(
                f"source {self._source.name!r}: {where} has no column {', '.join(map(repr, missing))}",
                hint=f"its columns are: {', '.join(sorted(columns))}; set column, template, prompt and answer, or "
                "messages",
            )

    def __call__(self, row: dict[str, Any], *, id: str, file: str | None = None) -> Document | None:
        """None for a row without text in a column it needs, or without a turn of the assistant.

        Raises:
            BadInput: a column is missing or holds something else; see :func:`turns_of`.
        """
        self.check(list(row), where=id)
        if self._source.messages is not None:
            return self._conversation(row[self._source.messages], id)
        values = {name: self._text(row[name], name, id) for name in self.columns}
        if not all(values.values()):
            return None
        source = self._source
        prompt = source.prompt.format(**values).strip() if source.prompt is not None else None
        if source.answer is not None:
            text = source.answer.format(**values).strip()
        else:
            text = source.template.format(**values) if source.template is not None else values[source.column]
        # The same question with two answers is one unit: its prompt must not be on both sides.
        return Document(id, file or row_file(prompt if prompt is not None else text), text, prompt)

    def _conversation(self, cell: object, id: str) -> Document | None:
        source = self._source
        turns = turns_of(cell, source.turns, f"source {source.name!r}: {id}: column {source.messages!r}")
        if turns is None:
            return None
        asked = next((turn.content for turn in turns if turn.role == USER), turns[-1].content)
        return conversation(id, row_file(asked), turns)

    def _text(self, value: object, name: str, where: str) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value if value.strip() else ""
        if isinstance(value, bool | int | float):
            return str(value)
        raise BadInput(
            f"source {self._source.name!r}: {where}: column {name!r} holds {type(value).__name__}, not text",
            hint=LISTS if isinstance(value, list) else None,
        )
