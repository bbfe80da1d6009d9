"""Recipes as people write them: overrides from the command line, and errors with their place and the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from prosparse_core.errors import BadInput


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change one key of a recipe that was read but not yet validated: ``train.stages.1.l1=0.1``.

    Raises:
        BadInput: the text is no key=value, or the place is not there.
    """
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise BadInput(f"--set {override!r}: expected key=value, for example train.lr=2e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {override!r}: the value is not valid YAML: {error}") from error
    node: Any = raw
    parts = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise BadInput(
                    f"--set {override!r}: {'.'.join(parts[:i])} has entries 0 to {len(node) - 1}, not {part!r}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise BadInput(f"--set {override!r}: {'.'.join(parts[:i])} is a plain value and has no part {part!r}")
        if last:
            node[index] = value
        else:
            node = node[index] if isinstance(node, list) else node.setdefault(index, {})


def explain(error: Any, root: type[BaseModel]) -> str:
    """One line for one pydantic error of ``root``: place, what, value, nearest name."""
    loc = error["loc"]
    place = ""
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1], root)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        rest = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{place}: unknown key; {rest}"
    if error["type"] == "missing":
        return f"{place}: required, but missing"
    if error["type"] == "literal_error" and isinstance(value, str):
        names = re.findall(r"'([^']+)'", str(error["ctx"]["expected"]))
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        return f"{place}: {value!r} is none of {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"{place}: {message}{shown}" if place else message


def _keys_at(loc: Sequence[Any], root: type[BaseModel]) -> list[str]:
    """The known keys of the section a place lies in."""
    section: Any = root
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        section = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
