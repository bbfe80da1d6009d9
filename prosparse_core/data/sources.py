"""Where text comes from: every source yields documents, and every document belongs to a file that is held out or not.

The split is decided by a hash of the document's ``file``, never of a chunk: two documents of one file cannot be on both
sides. For formats with many documents in one file (parquet, jsonl, csv, hub) the unit is the row, known by its content,
so that repeated rows fall on the same side whatever their order.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import Document as Document
from prosparse_core.data.documents import shuffled as shuffled
from prosparse_core.data.documents import split_of as split_of
from prosparse_core.data.documents import stable_hash as stable_hash
from prosparse_core.data.file_order import FilesInTurn
from prosparse_core.data.hub import hub_identity, open_hub, rows_of
from prosparse_core.data.readers import READERS, read_text
from prosparse_core.data.rendering import Renderer
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Source

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
SHUFFLE_BUFFER = 4096


def documents(source: Source, *, seed: int) -> Iterator[Document]:
    """The documents of a source, in an order shuffled by the seed. Only kind ``hub`` uses the network.

    Raises:
        BadInput: the source is missing or malformed, or lacks the column or template field asked for.
        EnvironmentProblem: the hub cannot be reached.
    """
    if source.kind == "files":
        return _from_files(source, seed)
    if source.kind == "hub":
        return _from_hub(source, seed)
    from prosparse_core.data import code_corpora

    return code_corpora.BUILTIN[source.kind].documents(seed)


def source_identity(source: Source) -> dict[str, Any]:
    """What the data behind a source is, cheaply: equal identities (and an equal seed) give equal documents.

    Raises:
        BadInput: kind ``files`` and there is no such file, or a mirror lacks the dataset.
    """
    if source.kind == "hub":
        return hub_identity(source)
    if source.kind == "files":
        if source.stream:  # too much to hash before each run
            return {"bytes": {name: path.stat().st_size for name, path in _find_files(source).items()}}
        digests = {}
        for name, path in _find_files(source).items():
            with path.open("rb") as handle:
                digests[name] = hashlib.file_digest(handle, "sha256").hexdigest()
        return {"files": digests}
    from prosparse_core.data import code_corpora

    return code_corpora.BUILTIN[source.kind].identity()


def check_source(source: Source) -> None:
    """What can be known of a source without a network: its templates are sound, and what lies here (files, a mirror)
    has its columns and text in them.

    Raises:
        BadInput: see :func:`documents`.
    """
    Renderer(source)
    if source.kind == "files":
        found: Iterator[Document] | None = _from_files(source, seed=0)
    else:
        found = open_hub_rows(source, 0, None)[1] if source.mirror is not None else None
    if found is not None and next(found, None) is None:
        raise BadInput(f"source {source.name!r} has no text", hint="check its path and columns")


def _find_files(source: Source) -> dict[str, Path]:
    """Name -> path of every file of the source; names are relative, so that moving the data changes no split."""
    where = Path(str(source.path)).expanduser()
    known = TEXT_SUFFIXES + ROW_SUFFIXES
    if where.is_dir():
        found = [p for p in where.rglob("*") if p.is_file() and p.suffix.lower() in known]
        root = where
    elif where.is_file():
        found, root = [where], where.parent
    else:
        found = [Path(p) for p in glob.glob(str(where), recursive=True) if Path(p).is_file()]
        fixed = [part for part in where.parts[:-1] if not glob.has_magic(part)]
        root = Path(*where.parts[: len(fixed)]) if fixed == list(where.parts[: len(fixed)]) else Path(where.anchor)
    if not found:
        raise BadInput(
            f"source {source.name!r}: nothing to read at path={source.path!r}",
            hint=f"path is a file, a folder or a glob of {', '.join(known)} files",
        )
    odd = sorted(str(p) for p in found if p.suffix.lower() not in known)
    if odd:
        raise BadInput(f"source {source.name!r}: cannot read {odd[0]}", hint=f"known suffixes: {', '.join(known)}")
    return {p.relative_to(root).as_posix(): p for p in sorted(found)}


def _from_files(source: Source, seed: int) -> Iterator[Document]:
    files = _find_files(source)
    render = Renderer(source)
    order = shuffled(files, seed)
    rows = [name for name in order if files[name].suffix.lower() in ROW_SUFFIXES]
    for name in order:
        if files[name].suffix.lower() in TEXT_SUFFIXES:
            yield from (document for _, document in _read_file(name, files[name], source, render))
    found = (document for name in rows for _, document in _read_file(name, files[name], source, render))
    yield from _buffered_shuffle(found, seed)


def _read_file(name: str, path: Path, source: Source, render: Renderer) -> Iterator[tuple[int, Document]]:
    """The documents of one file, each with the number of its row; a text is one row."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        document = render({"text": read_text(path, source), "file": name}, id=name, file=name)
        if document is not None:
            yield 1, document
        return
    for number, row in enumerate(READERS[suffix](path, source), start=1):
        document = render(row, id=f"{name}:{number}")
        if document is not None:
            yield number, document


def read_files(source: Source, seed: object, after: Sequence[Any] | None) -> Iterator[tuple[tuple[str, int], Document]]:
    """The documents of a source of kind ``files``, file by file in an order of the seed, each with its place.

    Args:
        after: begin with the document after this place; None: with the first.
    """
    files = _find_files(source)
    render = Renderer(source)
    order = shuffled(files, seed)
    if after is not None and after[0] not in files:
        raise BadInput(f"source {source.name!r}: the file {after[0]!r}, where the stream stood, is no longer there")
    for name in order[order.index(after[0]) if after is not None else 0 :]:
        for row, document in _read_file(name, files[name], source, render):
            if after is None or name != after[0] or row > after[1]:
                yield (name, row), document


def _from_hub(source: Source, seed: int) -> Iterator[Document]:
    return _buffered_shuffle(open_hub_rows(source, seed, None)[1], seed)


def open_hub_rows(source: Source, seed: object, state: dict[str, Any] | None) -> tuple[Any, Iterator[Document]]:
    """A hub dataset, its files in an order of the seed, from a ``state_dict()`` of it on (None: the beginning); and its
    documents."""
    render, parts = _hub_rows(source)
    rows = FilesInTurn(parts, seed)
    if state is not None:
        rows.load_state_dict(state)
    return rows, _render_hub(source, render, rows)


def _hub_rows(source: Source) -> tuple[Renderer, list[Any]]:
    render = Renderer(source)
    parts = []
    for data_dir, part in zip(source.data_dirs, open_hub(source), strict=True):
        where = "" if data_dir is None else f", data_dir {data_dir}"
        if part.column_names:
            render.check(part.column_names, where=f"{source.path}{where}, split {source.split}")
            part = part.select_columns(render.columns)
        parts.append(part)
    return render, parts


def _render_hub(source: Source, render: Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
    for number, row in enumerate(rows_of(source, rows), start=1):
        document = render(row, id=f"{source.path}, split {source.split}, row {number} as read")
        if document is not None:
            yield dataclasses.replace(document, id=f"{source.path}:{source.split}:{document.file[4:]}")


def _buffered_shuffle(items: Iterable[Document], seed: int) -> Iterator[Document]:
    rng, buffer = random.Random(f"rows {seed}"), []
    for item in items:
        buffer.append(item)
        if len(buffer) >= SHUFFLE_BUFFER:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
