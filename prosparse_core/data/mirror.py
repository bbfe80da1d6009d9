"""A mirror: a folder laid out like the hub (``DIR/owner/name/...``), read where the hub would be asked."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from prosparse_core.errors import BadInput


def open_mirror(folder: str, key: str) -> Path:
    """The folder that a recipe names under ``key``.

    Raises:
        BadInput: there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise BadInput(
            f"{key}: {folder} is no folder",
            hint="give a folder with OWNER/NAME/... as on the hub, or leave it out to use the hub",
        )
    return path


def digest(path: Path) -> str:
    """sha256 of a file; computed once for a file that does not change."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
