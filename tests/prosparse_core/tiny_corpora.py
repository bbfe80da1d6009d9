"""Small data for the tests: a folder of notes, recipes of data over it, and digests of what is prepared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from prosparse_core.recipe import Data, Source

SEQ_LEN = 64
SEED = 7


def notes(folder: Path, num: int = 60) -> Path:
    """A folder of small text files, each with a text of its own."""
    folder.mkdir(parents=True)
    for i in range(num):
        words = " ".join(hashlib.sha256(f"{i} {k}".encode()).hexdigest()[:6] for k in range(60))
        (folder / f"note{i:03d}.txt").write_text(f"Note {i}\n{words}\n", encoding="utf-8")
    return folder


def files(name: str, path: Path, weight: float = 1.0, **more: Any) -> Source:
    return Source(name=name, kind="files", weight=weight, path=str(path), **more)


def data_of(*sources: Source, **more: Any) -> Data:
    options = {"calibration_tokens": 256, "evaluation_tokens": 300, "choice_questions": 0, "seq_len": SEQ_LEN}
    return Data(sources=list(sources), **{**options, **more})


def real_data(folder: Path) -> Data:
    return data_of(
        Source(name="python-code", kind="python-code", weight=0.5, max_tokens=40_000),
        Source(name="package-docs", kind="package-docs", weight=0.3, max_tokens=20_000),
        Source(name="code-instructions", kind="code-instructions", weight=0.2, max_tokens=5_000),
        files("notes", folder, weight=0),
        calibration_tokens=4096,
        evaluation_tokens=4096,
        choice_questions=12,
    )


def digests(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
