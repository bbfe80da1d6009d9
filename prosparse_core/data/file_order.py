"""The files of a data set in an order of a seed, a few at a time: what lies side by side in it (StarCoder's languages,
one after the other) must not come to training in one piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prosparse_core.data.documents import shuffled

AT_ONCE = 8
"""Files that rows are taken from in turns."""


class FilesInTurn:
    """The rows of streamed data sets (each an ``IterableDataset``), every one once: resumed as a data set is.

    Args:
        parts: whose files come together in one order, such as the folders of a data set.
    """

    def __init__(self, parts: Sequence[Any], seed: object) -> None:
        self._files = [(part, i) for part in parts for i in range(part.num_shards)]
        self._order = shuffled(map(str, range(len(self._files))), seed)
        self._started, self._turn = 0, 0
        self._open: list[tuple[str, Any, Iterator[dict[str, Any]]]] = []

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, to be told to another one of the same data set and seed; plain JSON values."""
        parts = [[name, part.state_dict()] for name, part, _ in self._open]
        return {"started": self._started, "turn": self._turn, "open": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started, self._turn = state["started"], state["turn"]
        self._open = [self._part(name, where) for name, where in state["open"]]

    def _part(self, name: str, where: dict[str, Any] | None) -> tuple[str, Any, Iterator[dict[str, Any]]]:
        dataset, index = self._files[int(name)]
        part = dataset.shard(num_shards=dataset.num_shards, index=index)
        if where is not None:
            part.load_state_dict(where)
        return name, part, iter(part)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            while len(self._open) < AT_ONCE and self._started < len(self._files):
                self._open.append(self._part(self._order[self._started], None))
                self._started += 1
            if not self._open:
                return
            self._turn %= len(self._open)
            row = next(self._open[self._turn][2], None)
            if row is None:
                del self._open[self._turn]  # another file takes the last place
            else:
                self._turn += 1
                yield row
