"""What training must not see: the files that were drawn for calibration and evaluation, and their texts elsewhere.

Only as many files as the splits need tokens: which file *may* be drawn for which split is a property of its name
(:func:`prosparse_core.data.documents.split_of`), so that none is on two sides; which of them are, is decided once for
all corpora before the first training window, by reading each corpus in one order, the same for every seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from prosparse_core.data.documents import Document, split_of

ORDER = 8
"""The seed of the order in which held-out documents are drawn: not the recipe's, so that seeds share them."""
RULE = (
    "files are drawn for calibration and for evaluation, in one order for every seed, until they have the tokens that "
    "were asked; a file's name alone decides which of the two it may be drawn for; no corpus trains on a drawn file"
)
HELD_OUT = "held_out.json"
"""Its file in the folder of a mixture."""
HELD_OUT_SPLITS = ("calibration", "evaluation")


class HeldOut:
    """The files and texts, over all corpora."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = {split: set() for split in HELD_OUT_SPLITS}
        self.keys: set[bytes] = set()

    def add(self, document: Document) -> None:
        """Draw it, and with it its whole file."""
        self.files[split_of(document.file)].add(document.file)
        self.keys.add(document.key)

    def add_file(self, file: str) -> None:
        self.files[split_of(file)].add(file)

    def verdict(self, document: Document) -> Literal["train", "held out", "duplicate"]:
        """Whether training may see a document: not if its file was drawn, nor if its text was drawn from another."""
        if any(document.file in files for files in self.files.values()):
            return "held out"
        return "duplicate" if document.key in self.keys else "train"

    def to_plain(self) -> dict[str, Any]:
        """As JSON values; :meth:`from_plain` reads them."""
        return {
            "files": {split: sorted(files) for split, files in self.files.items()},
            "keys": sorted(key.hex() for key in self.keys),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> HeldOut:
        found = cls()
        files: Mapping[str, Iterable[str]] = plain["files"]
        found.files = {split: set(files[split]) for split in HELD_OUT_SPLITS}
        found.keys = {bytes.fromhex(key) for key in plain["keys"]}
        return found
