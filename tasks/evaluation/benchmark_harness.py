"""lm-eval's task files, read without importing it: names, groups, and which data each task needs.

lm-eval's own index parses 14,000 files, which takes 10 to 18 s; a folder of them takes none.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from prosparse_core.errors import BadInput, EnvironmentProblem

NAME = re.compile(r"""^["']?(?:task|group)["']?:[ ]*["']?([\w.\-]+)["']?[ ]*(?:\#.*)?$""", re.MULTILINE)

TAG = re.compile(r"""^tag:[ ]*(.*(?:\n[ ]*-[ ]*.+)*)""", re.MULTILINE)
WORD = re.compile(r"\w[\w.\-]*")


class Function(str):
    """Where a task file names a Python function: not imported here, for that may run things."""


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval, as its file says."""

    task: str
    path: Path
    config: str | None
    """Name of the dataset's configuration."""
    dataset: str
    settings: Mapping[str, Any]
    overrides: Mapping[str, Any]
    """What the group that names it changes."""

    @property
    def runs_code(self) -> bool:
        return bool(self.settings.get("unsafe_code"))

    @property
    def num_fewshot(self) -> int:
        return int(self.settings.get("num_fewshot") or 0)

    def splits(self, num_fewshot: int) -> tuple[str, ...]:
        """The splits that are read: the evaluated one first, then where the examples come from."""
        settings = self.settings
        splits = [settings.get("test_split") or settings.get("validation_split")]
        shots = settings.get("fewshot_config") or {}
        if num_fewshot and not shots.get("samples"):
            source = shots.get("split") or settings.get("fewshot_split") or settings.get("training_split")
            splits.append(source or settings.get("validation_split"))
        return tuple(dict.fromkeys(str(s) for s in splits if s))


def tasks_folder() -> Path:
    """Where lm-eval keeps its tasks.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem("lm-eval is not installed", hint="make setup installs everything")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


@lru_cache(maxsize=1)
def known_names() -> dict[str, str]:
    """Every task, group and tag of lm-eval, with the folder of its (first) file. Reads them all: a second or two."""
    root = tasks_folder()
    found: dict[str, str] = {}
    tags: dict[str, str] = {}
    for path in sorted(root.rglob("*.yaml")):
        text, folder = path.read_text(encoding="utf-8", errors="replace"), path.parent.relative_to(root).as_posix()
        for name in NAME.findall(text):
            if name not in ("null", "None"):
                found.setdefault(name, folder)
        for block in TAG.findall(text):
            for name in WORD.findall(block):
                tags.setdefault(name, folder)
    return {**tags, **found}


def find_leaves(name: str, folder: str) -> list[Leaf]:
    """The tasks behind a task or group of lm-eval whose file lies under ``folder``, in the group's order.

    Raises:
        BadInput: lm-eval does not have it there, or it is a task in Python, which cannot be given other data.
    """
    return list(_expand(name, folder, {}, ()))


def _expand(name: str, folder: str, overrides: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[Leaf]:
    entries, tags = _index(folder)
    if name in tags and name not in entries:
        for member in sorted(tags[name]):
            yield from _expand(member, folder, overrides, (*above, name))
        return
    if name not in entries:
        other = known_names().get(name)
        if other is None or other == folder or name in above:
            raise BadInput(f"lm-eval has no task {name!r} in {folder}", hint="check the installed version of lm-eval")
        yield from _expand(name, other, overrides, above)
        return
    path, settings = entries[name]
    if "group" in settings and isinstance(settings.get("task"), list):
        for member in settings["task"]:
            yield from _expand_member(member, folder, overrides, (*above, name))
        return
    settings = {**settings, **overrides}
    if "class" in settings or not settings.get("dataset_path"):
        raise BadInput(
            f"evaluate.benchmarks: lm-eval's {name} is a task in Python, not in YAML: its data cannot be chosen",
            hint="leave it out",
        )
    config = settings.get("dataset_name")
    dataset = str(settings["dataset_path"])
    yield Leaf(name, path, None if config is None else str(config), dataset, settings, dict(overrides))


def _expand_member(
    member: str | dict[str, Any], folder: str, overrides: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[Leaf]:
    """A member of a group: a name, a name with changes, or a group within the group."""
    if isinstance(member, str):
        yield from _expand(member, folder, overrides, above)
        return
    changes = {**overrides, **{k: v for k, v in member.items() if k not in ("task", "group")}}
    if isinstance(member.get("task"), list):
        for each in member["task"]:
            yield from _expand_member(each, folder, changes, above)
    else:
        yield from _expand(str(member.get("task") or member.get("group")), folder, changes, above)


@lru_cache(maxsize=64)
def _index(folder: str) -> tuple[dict[str, tuple[Path, dict[str, Any]]], dict[str, set[str]]]:
    """(name -> its file and settings, tag -> tasks) of the files under a folder of lm-eval's tasks."""
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    tags: dict[str, set[str]] = {}
    for path in sorted((tasks_folder() / folder).rglob("*.yaml")):
        settings = read_settings(path)
        name = settings.get("group") if isinstance(settings.get("task"), list) else settings.get("task")
        if not isinstance(name, str):
            continue
        entries.setdefault(name, (path, settings))
        tag = settings.get("tag") or []
        for each in [tag] if isinstance(tag, str) else tag:
            tags.setdefault(each, set()).add(name)
    return entries, tags


def read_settings(path: Path) -> dict[str, Any]:
    """A task file with what it includes; functions stay names."""
    with open(path, encoding="utf-8") as handle:
        settings = yaml.load(handle, Loader=_Loader)
    if not isinstance(settings, dict):
        return {}
    included = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        merged.update(read_settings(path.parent / each))
    return {**merged, **settings}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))
