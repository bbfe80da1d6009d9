"""Where text comes from: every source yields documents, and every document belongs to a file that is held out or not.

The split is decided by a hash of the document's ``file``, never of a chunk: two documents of one file cannot be on both
sides. For formats with many documents in one file (parquet, jsonl, csv, hub) the unit is the row, known by its content,
so that repeated rows fall on the same side whatever their order.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.recipe import Source

HELD_OUT_PCT = 8
"""Percent of the files that go to each of the two held-out splits."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
SHUFFLE_BUFFER = 4096
SHORT_CHARS = 100


@dataclass(frozen=True)
class Document:
    """A text, or (with a ``prompt``) an answer to it: then the loss is on the answer only."""

    id: str
    file: str
    """What is held out as a whole: a file, a distribution, a row."""
    text: str
    prompt: str | None = None

    @property
    def key(self) -> bytes:
        """Equal for documents that are the same but for white space. Short answers count only with their prompt."""
        text = " ".join(self.text.split())
        if self.prompt is not None and len(text) < SHORT_CHARS:
            text = " ".join(self.prompt.split()) + "\0" + text
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def stable_hash(*parts: object) -> int:
    """64 bits of the parts; the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def split_of(file: str) -> str:
    """``train``, ``calibration`` or ``evaluation``: a property of the file's name alone, the same in every corpus."""
    place = stable_hash("split", file) % 100
    if place < HELD_OUT_PCT:
        return "evaluation"
    return "calibration" if place < 2 * HELD_OUT_PCT else "train"


def shuffled(names: Iterable[str], seed: object) -> list[str]:
    """The names in an order that depends on the seed and on nothing else."""
    return sorted(names, key=lambda name: (stable_hash(seed, name), name))


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
        BadInput: kind ``files`` and there is no such file.
    """
    if source.kind == "hub":
        return {"path": source.path, "config": source.config, "split": source.split, "revision": source.revision}
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
    """What can be known of a source without a network: its templates are sound, its first file has the columns.

    Raises:
        BadInput: see :func:`documents`.
    """
    if source.kind == "hub":
        _Renderer(source)
    elif source.kind == "files" and next(_from_files(source, seed=0), None) is None:
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
    render = _Renderer(source)
    order = shuffled(files, seed)
    rows = [name for name in order if files[name].suffix.lower() in ROW_SUFFIXES]
    for name in order:
        if files[name].suffix.lower() in TEXT_SUFFIXES:
            yield from (document for _, document in _read_file(name, files[name], source, render))
    found = (document for name in rows for _, document in _read_file(name, files[name], source, render))
    yield from _buffered_shuffle(found, seed)


def _read_file(name: str, path: Path, source: Source, render: _Renderer) -> Iterator[tuple[int, Document]]:
    """The documents of one file, each with the number of its row; a text is one row."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        document = render({"text": _read_text(path, source), "file": name}, id=name, file=name)
        if document is not None:
            yield 1, document
        return
    for number, row in enumerate(_READERS[suffix](path, source), start=1):
        document = render(row, id=f"{name}:{number}")
        if document is not None:
            yield number, document


def read_files(source: Source, seed: object, after: Sequence[Any] | None) -> Iterator[tuple[tuple[str, int], Document]]:
    """The documents of a source of kind ``files``, file by file in an order of the seed, each with its place.

    Args:
        after: begin with the document after this place; None: with the first.
    """
    files = _find_files(source)
    render = _Renderer(source)
    order = shuffled(files, seed)
    if after is not None and after[0] not in files:
        raise BadInput(f"source {source.name!r}: the file {after[0]!r}, where the stream stood, is no longer there")
    for name in order[order.index(after[0]) if after is not None else 0 :]:
        for row, document in _read_file(name, files[name], source, render):
            if after is None or name != after[0] or row > after[1]:
                yield (name, row), document


def _from_hub(source: Source, seed: int) -> Iterator[Document]:
    render, stream = _hub_rows(source)
    return _render_hub(source, render, stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))


def open_hub_rows(source: Source, state: dict[str, Any] | None) -> tuple[Any, Iterator[Document]]:
    """A hub dataset in its own order, from a ``state_dict()`` of it on (None: the beginning); and its documents."""
    render, stream = _hub_rows(source)
    if state is not None:
        stream.load_state_dict(state)
    return stream, _render_hub(source, render, stream)


def _hub_rows(source: Source) -> tuple[_Renderer, Any]:
    render = _Renderer(source)
    stream = _open_hub(source)
    if stream.column_names:
        render.check(stream.column_names, where=f"{source.path}, split {source.split}")
        stream = stream.select_columns(render.columns)
    return render, stream


def _render_hub(source: Source, render: _Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
    for row in rows:
        document = render(row, id=f"{source.path}:{source.split}")
        if document is not None:
            yield Document(f"{document.id}:{document.file[4:]}", document.file, document.text, document.prompt)


def _open_hub(source: Source) -> Any:
    import datasets

    what = f"source {source.name!r}: hub dataset {source.path!r} (config {source.config!r}, split {source.split!r})"
    try:
        return datasets.load_dataset(
            str(source.path), source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise BadInput(f"{what} cannot be opened: {error}", hint="check path, config, split and revision") from error
    except OSError as error:
        raise EnvironmentProblem(
            f"{what} cannot be reached: {error}", hint="check the network, or use kind: files with a local copy"
        ) from error


class _Renderer:
    """Turns a row into a document by the source's column or templates."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._fields = {
            key: self._parse(key, template)
            for key in ("template", "prompt", "answer")
            if (template := getattr(source, key)) is not None
        }
        named = [name for names in self._fields.values() for name in names]
        self.columns: list[str] = sorted(set(named)) if self._fields else [source.column]

    def _parse(self, key: str, template: str) -> list[str]:
        where = f"source {self._source.name!r}: {key}={template!r}"
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise BadInput(f"{where}: {error}", hint="write a literal brace twice: {{ or }}") from error
        if not fields or not all(field.isidentifier() for field in fields):
            raise BadInput(f"{where}: needs columns in braces, such as {{text}}", hint="only plain names are allowed")
        return fields

    def check(self, columns: Sequence[str], *, where: str) -> None:
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise BadInput(
                f"source {self._source.name!r}: {where} has no column {', '.join(map(repr, missing))}",
                hint=f"its columns are: {', '.join(sorted(columns))}; set column, template, or prompt and answer",
            )

    def __call__(self, row: dict[str, Any], *, id: str, file: str | None = None) -> Document | None:
        """None for a row without text in a column it needs."""
        self.check(list(row), where=id)
        values = {name: self._text(row[name], name, id) for name in self.columns}
        if not all(values.values()):
            return None
        source = self._source
        prompt = source.prompt.format(**values).strip() if source.prompt is not None else None
        if source.answer is not None:
            text = source.answer.format(**values).strip()
        else:
            text = source.template.format(**values) if source.template is not None else values[source.column]
        if file is None:
            # The same question with two answers is one unit: its prompt must not be on both sides.
            unit = " ".join((prompt if prompt is not None else text).split())
            file = f"row:{stable_hash(unit):016x}"
        return Document(id, file, text, prompt)

    def _text(self, value: object, name: str, where: str) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value if value.strip() else ""
        if isinstance(value, bool | int | float):
            return str(value)
        raise BadInput(f"source {self._source.name!r}: {where}: column {name!r} holds {type(value).__name__}, not text")


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


def _read_text(path: Path, source: Source) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        hint = "convert the file, or leave it out"
        raise BadInput(f"source {source.name!r}: {path} is not UTF-8: {error}", hint=hint) from error


def _read_jsonl(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _object(_json(line, f"{path}:{number}", source), f"{path}:{number}", source)


def _read_json(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    content = _json(path.read_bytes(), str(path), source)
    if not isinstance(content, list):
        raise BadInput(f"source {source.name!r}: {path} is not a list of objects", hint="one object a line is .jsonl")
    for number, row in enumerate(content, start=1):
        yield _object(row, f"{path}:{number}", source)


def _json(text: bytes, where: str, source: Source) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # also what a wrong encoding raises
        raise BadInput(f"source {source.name!r}: {where}: not valid JSON: {error}") from error


def _object(row: Any, where: str, source: Source) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"source {source.name!r}: {where}: expected an object, this is {type(row).__name__}")
    return row


def _read_csv(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                yield {str(name): value for name, value in row.items() if name is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"source {source.name!r}: {path}: not a UTF-8 CSV file: {error}") from error


def _read_parquet(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"source {source.name!r}: {path}: not a parquet file: {error}") from error
    with table:
        render = _Renderer(source)
        render.check(table.schema_arrow.names, where=str(path))
        for batch in table.iter_batches(batch_size=1024, columns=render.columns):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path, Source], Iterator[dict[str, Any]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
