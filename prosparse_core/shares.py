"""Which corpus each sample of the training comes from: exact shares in every block, stage by stage.

Sample ``i`` (from 0) lies in the segment of its stage: stages that follow each other with the same shares are one. A
segment is cut into blocks of 1024 samples, in which every corpus has its places, in an order shuffled by the seed.
How many samples of a corpus came before is counted over all segments, so that a corpus goes on where the stage before
left off.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prosparse_core.data.sources import stable_hash
from prosparse_core.recipe_mixture import BLOCK, block_counts
from prosparse_core.recipe_train import Stage


@dataclass(frozen=True)
class Segment:
    """From sample ``first`` (from 0) on, ``counts`` samples of each corpus in a block."""

    first: int
    counts: tuple[int, ...]


def segments_of(weights: Mapping[str, float], stages: Sequence[Stage], sequences: int) -> list[Segment]:
    """The segments of a training with ``sequences`` samples a step; ``weights`` are those of ``data.sources``.

    Without stages: one that never ends.
    """
    found: list[Segment] = []
    first = 0
    for mixture, until_step in [(s.mixture, s.until_step) for s in stages] or [(None, 0)]:
        counts = block_counts(dict.fromkeys(weights, 0.0) | mixture if mixture is not None else weights)
        segment = Segment(first, tuple(counts[name] for name in weights))
        if not found or found[-1].counts != segment.counts:
            found.append(segment)
        first = until_step * sequences
    return found


class SampleOrder:
    """Corpus and turn of every sample: a pure function of the seed and the segments."""

    def __init__(self, seed: int, segments: Sequence[Segment]) -> None:
        assert segments[0].first == 0
        self.segments = list(segments)
        self._seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._before: list[tuple[int, ...]] = []
        for segment in segments:
            self._before.append(self.before(segment.first) if self._before else (0,) * len(segment.counts))

    def _segment(self, index: int) -> int:
        """The last segment that has begun, of those whose beginning is known."""
        return max(i for i in range(len(self._before)) if self.segments[i].first <= index)

    def turn(self, index: int) -> tuple[int, int]:
        """Corpus of sample ``index`` (from 0), and how many of its samples precede it."""
        number = self._segment(index)
        segment = self.segments[number]
        block, place = divmod(index - segment.first, BLOCK)
        corpora, ranks = self._block(number, block)
        corpus = int(corpora[place])
        return corpus, self._before[number][corpus] + block * segment.counts[corpus] + int(ranks[place])

    def before(self, index: int) -> tuple[int, ...]:
        """How many samples of each corpus precede sample ``index``."""
        # a segment's first sample is counted by the segment before
        number = self._segment(max(0, index - 1)) if index else 0
        segment = self.segments[number]
        block, place = divmod(index - segment.first, BLOCK)
        corpora, _ = self._block(number, block)
        begun = np.bincount(corpora[:place], minlength=len(segment.counts))
        before = zip(self._before[number], segment.counts, begun, strict=True)
        return tuple(earlier + block * count + int(more) for earlier, count, more in before)

    def needed(self, index: int) -> list[bool]:
        """Of each corpus: whether sample ``index`` or one after it may be of it."""
        later = self.segments[self._segment(index) :]
        return [any(counts) for counts in zip(*(segment.counts for segment in later), strict=True)]

    def _make_block(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in the block: its corpus, and how many samples of that corpus precede it in the block."""
        segment = self.segments[number]
        key: tuple[object, ...] = (block,) if number == 0 else (segment.first, block)
        sorted_places = np.repeat(np.arange(len(segment.counts)), segment.counts)
        corpora = sorted_places[permutation(BLOCK, self._seed, "block", *key)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for corpus, count in enumerate(segment.counts):
            ranks[corpora == corpus] = np.arange(count)
        return corpora, ranks


def permutation(length: int, *key: object) -> np.ndarray:
    """A permutation of ``range(length)`` by the key.

    Sorted by splitmix64 rather than drawn from a library's generator, whose stream may change with its version.
    """
    x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.array(stable_hash(*key), dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
