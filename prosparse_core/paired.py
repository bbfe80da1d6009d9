"""How two variants differ on the same documents: a paired bootstrap by document.

Both read the same text, so what one document does to one variant it does to the other as well: resampling documents for
both at once leaves of the error what belongs to their difference (Efron and Tibshirani, 1993, chapter 8; for
perplexities and benchmarks of language models Koehn, 2004). The samples are a function of the documents alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prosparse_core.data.sources import stable_hash

REPLICATES = 1000
MIN_DOCUMENTS = 10
"""Resampling fewer says too little of what other documents would have brought."""
LEVEL = 0.95
_AT_ONCE = 1 << 22
"""Draws held in memory."""


@dataclass(frozen=True)
class Scored:
    """What each document contributed to one variant's mean, sum(sums) / sum(counts); as long as there are documents."""

    documents: str
    """Which documents they are, in their order; what the samples are drawn by."""
    sums: Sequence[float]
    counts: Sequence[float]


@dataclass(frozen=True)
class Difference:
    """First minus second; ``low`` and ``high`` are the 95 % interval, None (all three) where ``note`` says why."""

    value: float
    low: float | None
    high: float | None
    stderr: float | None
    """Standard deviation over the samples."""
    num_documents: int
    note: str | None = None


def difference(pairs: Sequence[tuple[Scored, Scored]], weights: Sequence[float]) -> Difference:
    """The weighted mean over parts (corpora, tasks of a group) of the first's mean less the second's.

    Each part's documents are resampled by themselves, the same ones for both.

    Args:
        pairs: of every part, both variants on the same documents.
        weights: of the parts; only their ratios matter.
    """
    whole = math.fsum(weights)
    kept = [(pair, weight / whole) for pair, weight in zip(pairs, weights, strict=True) if weight > 0]
    assert all(a.documents == b.documents and len(a.sums) == len(b.sums) for (a, b), _ in kept)
    value = math.fsum(weight * (_mean(a) - _mean(b)) for (a, b), weight in kept)
    sizes = [len(a.sums) for (a, _), _ in kept]
    if min(sizes) < MIN_DOCUMENTS:
        few = f"{min(sizes)} documents" + (" in one part" if len(sizes) > 1 else "")
        return Difference(value, None, None, None, sum(sizes), f"{few}: fewer than {MIN_DOCUMENTS} give no interval")
    found = np.zeros(REPLICATES)
    for (a, b), weight in kept:
        found += weight * (replicates(a) - replicates(b))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(value, float(low), float(high), float(found.std(ddof=1)), sum(sizes))


def replicates(scored: Scored) -> np.ndarray:
    """The mean on each of the samples; float64 [``REPLICATES``]."""
    sums, counts = np.asarray(scored.sums, dtype=np.float64), np.asarray(scored.counts, dtype=np.float64)
    found = np.empty(REPLICATES)
    rows = max(1, _AT_ONCE // len(sums))
    for start in range(0, REPLICATES, rows):
        chosen = samples(scored.documents, len(sums), start, min(start + rows, REPLICATES))
        found[start : start + len(chosen)] = sums[chosen].sum(1) / counts[chosen].sum(1)
    return found


def samples(documents: str, num: int, start: int = 0, end: int = REPLICATES) -> np.ndarray:
    """The documents of samples ``start`` to ``end``: int64 [samples, num], each from 0 to below ``num``.

    By splitmix64 rather than by a library's generator, whose stream may change with its version.
    """
    x = np.arange(start * num + 1, end * num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.array(stable_hash("bootstrap", documents), dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(num)).astype(np.int64).reshape(end - start, num)


def _mean(scored: Scored) -> float:
    return math.fsum(scored.sums) / math.fsum(scored.counts)
