"""Datasets of the hub as streams of rows: over the network, or from a mirror, by the datasets library alike."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prosparse_core.data.mirror import digest, open_mirror
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.recipe import Source


def open_hub(source: Source) -> list[Any]:
    """The dataset of a source of kind ``hub``, as an ``IterableDataset`` for each of its ``data_dir``.

    Raises:
        BadInput: there is no such dataset, config, split or folder in it; or no such mirror.
        EnvironmentProblem: the hub cannot be reached.
    """
    import datasets

    def opened(options: dict[str, Any]) -> Any:
        return datasets.load_dataset(**options, split=source.split, streaming=True)

    return [_asked(source, data_dir, opened) for data_dir in source.data_dirs]


def rows_of(source: Source, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, read from an opened dataset.

    Raises:
        BadInput: its files differ in their columns.
    """
    from datasets.table import CastError

    try:
        yield from rows
    except CastError as error:
        raise BadInput(
            f"source {source.name!r}: the files of {source.path!r} differ in their columns: {error}",
            hint="name the folder that has the column with data_dir, or several that have it",
        ) from error


def hub_identity(source: Source) -> dict[str, Any]:
    """What tells the dataset from others of its name, without a network: the revision asked for, or, of a mirror, the
    files that it would read with their digests (of a stream: their sizes), wherever the mirror lies.

    Raises:
        BadInput: see :func:`open_hub`.
    """
    asked: dict[str, Any] = {"path": source.path, "config": source.config, "split": source.split}
    if source.data_dir is not None:
        asked["data_dir"] = source.data_dir
    if source.mirror is None:
        return {**asked, "revision": source.revision}
    root = _mirrored(source)
    files = {path.relative_to(root).as_posix(): path for path in _files(source)}
    if source.stream:  # too much to hash before each run
        return {**asked, "bytes": {name: path.stat().st_size for name, path in files.items()}}
    return {**asked, "files": {name: digest(path) for name, path in files.items()}}


def _files(source: Source) -> Iterable[Path]:
    """The files of a mirror that make the split, as the datasets library finds them."""
    import datasets

    def resolved(options: dict[str, Any]) -> list[Path]:
        found = datasets.load_dataset_builder(**options).config.data_files or {}
        if source.split not in found:
            raise ValueError(f"no split {source.split!r}: it has {', '.join(map(str, found)) or 'none'}")
        return [Path(str(name)) for name in found[source.split]]

    return sorted({path for data_dir in source.data_dirs for path in _asked(source, data_dir, resolved)})


def _asked(source: Source, data_dir: str | None, question: Any) -> Any:
    """The answer of the datasets library to a question about a dataset, its errors as ours."""
    import datasets

    _read_zstd()
    where = "hub" if source.mirror is None else "mirrored"
    parts = {"config": source.config, "split": source.split, **({} if data_dir is None else {"data_dir": data_dir})}
    told = ", ".join(f"{key} {value!r}" for key, value in parts.items())
    what = f"source {source.name!r}: {where} dataset {source.path!r} ({told})"
    options = {"path": str(source.path), "name": source.config, "revision": source.revision, "data_dir": data_dir}
    if source.mirror is not None:  # whose identity is its content: revisions are the hub's
        options |= {"path": str(_mirrored(source)), "revision": None}
    try:
        datasets.disable_progress_bars()
        return question({key: value for key, value in options.items() if value is not None})
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        keys = "path, config, data_dir, split" + ("" if source.mirror else " and revision")
        raise BadInput(f"{what} cannot be opened: {error}", hint=f"check {keys}") from error
    except OSError as error:
        raise EnvironmentProblem(
            f"{what} cannot be reached: {error}",
            hint="check the network, or use data.mirror or kind: files with a local copy",
        ) from error


def _mirrored(source: Source) -> Path:
    folder = open_mirror(str(source.mirror), "data.mirror") / str(source.path)
    if not folder.is_dir():
        raise BadInput(
            f"source {source.name!r}: the mirror has no dataset {source.path}: there is no folder {folder}",
            hint="copy the dataset there as it is on the hub, or leave data.mirror out",
        )
    return folder.resolve()


def _read_zstd() -> None:
    """Let fsspec read .zst by pyarrow, which is here anyway: it knows none itself, and with the package zstandard it
    stops without a word after the first frame of a file."""
    from fsspec.compression import register_compression  # type: ignore[import-untyped]

    register_compression("zstd", _open_zstd, "zst", force=True)


def _open_zstd(raw: Any, mode: str = "rb", **_: Any) -> io.BufferedReader:
    import pyarrow  # type: ignore[import-untyped]

    assert "r" in mode, "only reading"
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
