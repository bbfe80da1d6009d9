"""Files as rows (parquet, jsonl, json, csv) or as one text; what is broken is named with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prosparse_core.data.rendering import Renderer
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Source


def read_text(path: Path, source: Source) -> str:
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
        render = Renderer(source)
        render.check(table.schema_arrow.names, where=str(path))
        for batch in table.iter_batches(batch_size=1024, columns=render.columns):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path, Source], Iterator[dict[str, Any]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
