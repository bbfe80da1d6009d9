"""Where benchmarks get their data: the hub, or a mirror folder laid out like it, read without asking the network.

A mirror holds ``owner/name/`` per dataset. Which files make which split says the ``configs:`` block of its README, as
on the hub; without one, the layout does: ``<config>/<split>*.parquet`` (or jsonl, json), for the configuration
``default`` also ``data/<split>*`` and ``<split>*``. Loading scripts are not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import yaml

from prosparse_core.data.mirror import digest, open_mirror
from prosparse_core.errors import BadInput, EnvironmentProblem

FORMATS = (".parquet", ".jsonl", ".json")
SHARD = re.compile(r"^(.+?)(?:-\d+-of-\d+(?:-[0-9a-f]+)?)?$")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


class MissingData(Exception):
    """The data of a task are not to be had or do not fit it; says of which dataset, and where it was looked for or what
    does not fit."""


class Datasets(Protocol):
    """A place that datasets come from."""

    def identity(self, dataset: str, config: str | None, splits: Sequence[str], columns: Sequence[str]) -> Any:
        """What tells this data from other data of the same name; raises MissingData, or BadInput for a wrong schema."""

    def load(self, dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, Any]:
        """Splits as ``datasets.Dataset``; raises MissingData, or EnvironmentProblem where another time may help."""


def open_datasets(folder: str | None) -> Datasets:
    """The mirror at ``folder``, or the hub.

    Raises:
        BadInput: there is no such folder.
    """
    return Hub() if folder is None else Mirror(open_mirror(folder, "evaluate.datasets"))


class Mirror:
    """A folder laid out like the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def identity(self, dataset: str, config: str | None, splits: Sequence[str], columns: Sequence[str]) -> Any:
        found = self._files(dataset, config, splits)
        for paths in found.values():
            for path in paths:
                _check_columns(path, columns)
        return {split: [digest(p) for p in paths] for split, paths in found.items()}

    def load(self, dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, Any]:
        from datasets import concatenate_datasets

        found = self._files(dataset, config, splits)
        return {split: concatenate_datasets([_read(p) for p in paths]) for split, paths in found.items()}

    def _files(self, dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, list[Path]]:
        root = self.folder / dataset
        if not root.is_dir():
            raise MissingData(f"dataset {dataset} not found in {self.folder}")
        configs = _declared(root) or _by_layout(root)
        only = next(iter(configs)) if len(configs) == 1 else "default"
        name = config or ("default" if "default" in configs else only)
        if name not in configs:
            raise MissingData(f"dataset {dataset} has no configuration {name} in {self.folder}")
        files = configs[name]
        for split in splits:
            if not files.get(split):
                raise MissingData(f"dataset {dataset} ({name}) has no split {split} in {self.folder}")
        return {split: files[split] for split in splits}


def _declared(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Configurations by the README's ``configs:`` block: config -> split -> files; empty without one."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = FRONT_MATTER.match(text)
    try:
        entries = (yaml.safe_load(front.group(1)) or {}).get("configs") if front else None
        found: dict[str, dict[str, list[Path]]] = {}
        for entry in entries or []:
            declared = entry["data_files"]
            declared = [declared] if isinstance(declared, str | dict) else declared
            splits = found.setdefault(str(entry["config_name"]), {})
            for each in declared:
                split, patterns = ("train", each) if isinstance(each, str) else (str(each["split"]), each["path"])
                for pattern in [patterns] if isinstance(patterns, str) else patterns:
                    splits.setdefault(split, []).extend(sorted(p for p in root.glob(pattern) if p.is_file()))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise BadInput(
            f"{root / 'README.md'}: its configs block is not as on the hub: {error!r}",
            hint="each entry has config_name and data_files with split and path",
        ) from error
    return found


def _by_layout(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Configurations by folder, splits by the beginning of the file's name."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix in FORMATS and p.is_file()):
        parts = path.relative_to(root).parts[:-1]
        config = "default" if not parts or parts == ("data",) else parts[0]
        match = SHARD.match(path.stem)
        assert match is not None, "every name has a beginning"
        found.setdefault(config, {}).setdefault(match.group(1), []).append(path)
    return found


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    there, num_rows = _schema(path, path.stat().st_size, path.stat().st_mtime_ns)
    missing = [c for c in columns if c not in there]
    if missing:
        raise BadInput(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}: it has {', '.join(there)}",
            hint="mirror the dataset as it is on the hub",
        )
    if not num_rows:
        raise BadInput(f"{path} holds no rows", hint="mirror the dataset as it is on the hub")


@lru_cache(maxsize=4096)
def _schema(path: Path, size: int, changed_ns: int) -> tuple[tuple[str, ...], int]:
    """(columns, number of rows) of a file; the size and time of change are there for the cache only."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            with parquet.ParquetFile(path) as file:
                return tuple(file.schema_arrow.names), int(file.metadata.num_rows)
        rows = _read_json(path)
        return tuple(rows[0]) if rows else (), len(rows)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise BadInput(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of objects")
    return rows


def _read(path: Path) -> Any:
    """A file as a ``datasets.Dataset`` in memory: nothing is written to the user's dataset cache."""
    from datasets import Dataset

    if path.suffix != ".parquet":
        return Dataset.from_list(_read_json(path))
    import pyarrow.parquet as parquet
    from datasets.table import InMemoryTable

    with parquet.ParquetFile(path) as file:
        return Dataset(InMemoryTable(file.read()))


OFFLINE = "offline"


class Hub:
    """The Hugging Face hub, or what of it is in the local cache."""

    WHERE = "the hub"

    def identity(self, dataset: str, config: str | None, splits: Sequence[str], columns: Sequence[str]) -> Any:
        return _revision(dataset)

    def load(self, dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, Any]:
        import datasets

        try:
            found: Mapping[str, Any] = datasets.load_dataset(dataset, config)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            if _revision(dataset) != OFFLINE and not _lasts(error):
                raise EnvironmentProblem(
                    f"dataset {dataset} is in {self.WHERE} and cannot be had: {type(error).__name__}: {first}",
                    hint="run the same command again: what has been measured is kept",
                ) from error
            raise MissingData(f"dataset {dataset} not found in {self.WHERE}: {first}") from error
        for split in splits:
            if split not in found:
                raise MissingData(f"dataset {dataset} ({config or 'default'}) has no split {split} in {self.WHERE}")
        return dict(found)


def _lasts(error: Exception) -> bool:
    """Whether the dataset itself is at fault: no such configuration, a script, no such files, rows that do not parse.

    All else, such as a connection that breaks, may be otherwise the next time: it is no result.
    """
    from datasets.exceptions import DatasetsError

    if isinstance(error, DatasetsError) and not isinstance(error, FileNotFoundError):
        return not isinstance(error.__cause__, OSError)
    return isinstance(error, ValueError | RuntimeError | FileNotFoundError)


@lru_cache(maxsize=256)
def _revision(dataset: str) -> str:
    """The commit of a dataset on the hub; ``OFFLINE`` when nobody answers: another identity, measured again later."""
    if _unreachable:
        return OFFLINE
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(dataset, timeout=10).sha)
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            raise MissingData(f"dataset {dataset} not found in {Hub.WHERE}") from error
        _unreachable.append(dataset)
        return OFFLINE


_unreachable: list[str] = []
"""What showed that the hub cannot be reached: it is not asked 80 times."""
