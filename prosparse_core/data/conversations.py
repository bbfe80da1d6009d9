"""The turns of a conversation from a row's list column, in the forms that data sets have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prosparse_core.data.documents import ASSISTANT, SYSTEM, USER, Turn
from prosparse_core.errors import BadInput

Form = Literal["role/content", "from/value", "alternating"]
ROLES = {"user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM}
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
TOOL_KEYS = ("tool_calls", "function_call")
NO_TOOLS = "tools are not trained on: leave these rows out of the data"


def turns_of(value: Any, form: Form, where: str) -> tuple[Turn, ...] | None:
    """The turns in a cell, up to the last one of the assistant; contents lose the white space around them.

    An empty system turn is left out. None for a conversation in which the assistant says nothing, or in which another
    turn is empty: it has no meaning without that.

    Args:
        form: ``role/content`` and ``from/value`` name the keys of each turn; ``alternating`` is a list of texts, of
            which the user has the first.
        where: source and row, for errors.

    Raises:
        BadInput: the cell is not of the form; an unknown role, a tool's turn, a system turn that is not the first.
    """
    if value is None:
        return None
    found: list[Turn] = []
    for number, item in enumerate(_items(value, form, where)):
        here = f"{where}: turn {number + 1}"
        if form == "alternating":
            role, content = (USER, ASSISTANT)[number % 2], item
        else:
            role, content = _role_and_content(item, form, here)
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise BadInput(f"{here}: its content is {type(content).__name__}, not text")
        if role == SYSTEM and number:
            raise BadInput(f"{here} is a system turn", hint="a system turn is the first of its conversation, or none")
        if content.strip():
            found.append(Turn(role, content.strip()))
        elif role != SYSTEM:
            return None
    last = max((i for i, turn in enumerate(found) if turn.role == ASSISTANT), default=-1)
    return tuple(found[: last + 1]) or None


def _items(value: Any, form: Form, where: str) -> Sequence[Any]:
    if isinstance(value, Mapping) and form != "alternating":
        # how the datasets library gives a sequence of records: a list for each key
        columns = {key: column for key, column in value.items() if isinstance(column, Sequence)}
        if set(form.split("/")) <= set(columns) and len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadInput(f"{where}: this is {type(value).__name__}, not a list of turns (turns: {form})")
    return value


def _role_and_content(item: Any, form: Form, where: str) -> tuple[str, Any]:
    role_key, content_key = form.split("/")
    if not isinstance(item, Mapping) or role_key not in item or content_key not in item:
        there = f"has {', '.join(map(repr, item))}" if isinstance(item, Mapping) else f"is {type(item).__name__}"
        raise BadInput(
            f"{where}: needs {role_key!r} and {content_key!r}, this {there}",
            hint="turns is role/content, from/value, or alternating for a list of texts",
        )
    said = item[role_key]
    if said in TOOL_ROLES or any(item.get(key) for key in TOOL_KEYS):
        raise BadInput(f"{where}: {role_key}={said!r} belongs to the use of a tool", hint=NO_TOOLS)
    if said not in ROLES:
        raise BadInput(f"{where}: unknown {role_key}={said!r}", hint=f"known: {', '.join(ROLES)}")
    return ROLES[said], item[content_key]
