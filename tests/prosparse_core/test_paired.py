"""The paired bootstrap: against a twin in plain loops, and against what independent errors would have said."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prosparse_core import paired
from prosparse_core.data.sources import stable_hash
from prosparse_core.paired import REPLICATES, Scored, difference, replicates, samples

WORD = 2**64


def twin_samples(documents: str, num: int, sample: int) -> list[int]:
    """splitmix64 by hand."""
    drawn = []
    for at in range(num):
        x = ((sample * num + at + 1) * 0x9E3779B97F4A7C15 + stable_hash("bootstrap", documents)) % WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
        drawn.append((x ^ (x >> 31)) % num)
    return drawn


def quantile(values: list[float], share: float) -> float:
    values = sorted(values)
    place = share * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def made(seed: int, num: int, shift: float = 0.2, documents: str = "d") -> tuple[Scored, Scored]:
    """Documents that differ much, and two models that differ little and everywhere alike."""
    draw = random.Random(seed)
    counts = [float(draw.randint(50, 500)) for _ in range(num)]
    hard = [draw.gauss(2.5, 0.8) for _ in counts]
    first = [c * (h + shift + draw.gauss(0, 0.05)) for c, h in zip(counts, hard, strict=True)]
    second = [c * h for c, h in zip(counts, hard, strict=True)]
    return Scored(documents, first, counts), Scored(documents, second, counts)


def test_the_twin_in_plain_loops() -> None:
    parts = [made(1, 12, documents="a"), made(2, 17, documents="b")]
    weights = [3.0, 1.0]
    found = difference(parts, weights)
    draws = []
    for sample in range(REPLICATES):
        total = 0.0
        for (a, b), weight in zip(parts, weights, strict=True):
            chosen = twin_samples(a.documents, len(a.sums), sample)
            means = [sum(s.sums[i] for i in chosen) / sum(s.counts[i] for i in chosen) for s in (a, b)]
            total += weight / 4 * (means[0] - means[1])
        draws.append(total)
    mean = sum(draws) / len(draws)
    assert found.low == pytest.approx(quantile(draws, 0.025), rel=1e-9)
    assert found.high == pytest.approx(quantile(draws, 0.975), rel=1e-9)
    assert found.stderr == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in draws) / (len(draws) - 1)), rel=1e-9)
    exact = [sum(a.sums) / sum(a.counts) - sum(b.sums) / sum(b.counts) for a, b in parts]
    assert found.value == pytest.approx(0.75 * exact[0] + 0.25 * exact[1])
    assert (found.num_documents, found.note) == (29, None)


def test_the_paired_interval_is_much_narrower_than_the_independent_one() -> None:
    """A golden case: a real difference of 0.2 nats, which independent errors do not tell from none."""
    a, b = made(7, 40)
    found = difference([(a, b)], [1.0])
    assert found.low is not None
    assert found.high is not None
    assert found.stderr is not None
    independent = math.hypot(replicates(a).std(), replicates(Scored("other", b.sums, b.counts)).std())
    assert found.value == pytest.approx(0.2, abs=0.02)
    assert 0.15 < found.low < found.value < found.high < 0.25
    assert found.value < 1.96 * independent, "taken as independent the two would not differ"
    assert found.stderr < independent / 10


def test_samples_are_of_the_documents_alone_and_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = samples("d", 30)
    assert whole.shape == (REPLICATES, 30)
    assert (samples("d", 30, 20, 25) == whole[20:25]).all()
    assert (samples("e", 30) != whole).any()
    frequencies = [(whole == i).mean() for i in range(30)]
    assert max(frequencies) - min(frequencies) < 0.01
    scored = made(3, 30)[0]
    before = replicates(scored)
    monkeypatch.setattr(paired, "_AT_ONCE", 70)
    assert (replicates(scored) == before).all()


def test_few_documents_have_a_value_and_no_interval() -> None:
    found = difference([made(1, 9)], [1.0])
    assert found.value == pytest.approx(0.2, abs=0.05)
    assert (found.low, found.high, found.stderr) == (None, None, None)
    assert found.note == "9 documents: fewer than 10 give no interval"
    mixed = difference([made(1, 20, documents="a"), made(2, 4, documents="b")], [0.5, 0.5])
    assert mixed.note == "4 documents in one part: fewer than 10 give no interval"
    only_measured = difference([made(1, 20, documents="a"), made(2, 4, documents="b")], [1.0, 0.0])
    assert only_measured.low is not None, "a corpus without a share of the mixture does not count"
    assert only_measured.num_documents == 20


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(10, 40))
def test_the_other_way_round_is_the_opposite(seed: int, num: int) -> None:
    a, b = made(seed, num)
    one, other = difference([(a, b)], [1.0]), difference([(b, a)], [1.0])
    assert one.low is not None
    assert other.high is not None
    assert (one.value, one.low) == (pytest.approx(-other.value), pytest.approx(-other.high))
    assert difference([(a, a)], [1.0]).high == 0
