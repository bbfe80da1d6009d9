"""Which corpus each sample is of, stage by stage, against a walk from the first sample that remembers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.recipe_mixture import BLOCK, block_counts, trained_corpora
from prosparse_core.recipe_train import Stage
from prosparse_core.shares import SampleOrder, permutation, segments_of

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2, "d": 0.0}
SEED = 7


def stage(until_step: int, mixture: dict[str, float] | None = None) -> Stage:
    return Stage(until_step=until_step, l1=0, mixture=mixture)


def walk(stages: list[Stage], sequences: int) -> Iterator[tuple[int, int]]:
    """(corpus, turn) of every sample, with a cursor for each corpus and a shuffled block that is used up."""
    names, cursors = list(WEIGHTS), Counter[int]()
    counts: dict[str, int] = {}
    left: list[int] = []
    begin = block = 0
    for index in range(stages[-1].until_step * sequences):
        now = next(s for s in stages if index < s.until_step * sequences)
        wanted = block_counts(WEIGHTS if now.mixture is None else {n: now.mixture.get(n, 0.0) for n in names})
        if wanted != counts:
            counts, left, begin, block = wanted, [], index, 0
        if not left:
            places = [i for i, name in enumerate(names) for _ in range(counts[name])]
            key = (block,) if begin == 0 else (begin, block)
            left = [places[p] for p in permutation(BLOCK, SEED, "block", *key)]
            block += 1
        corpus = left.pop(0)
        yield corpus, cursors[corpus]
        cursors[corpus] += 1


MIXED = [
    stage(150),
    stage(151),
    stage(300, {"a": 1, "d": 1}),
    stage(301, {"b": 1}),
    stage(800, {"d": 2, "a": 2}),
    stage(1000),
]


@pytest.mark.parametrize("sequences", [1, 5])
def test_every_sample_is_that_of_the_walk_in_any_order(sequences: int) -> None:
    order = SampleOrder(SEED, segments_of(WEIGHTS, MIXED, sequences))
    walked = list(walk(MIXED, sequences))
    assert len(walked) == 1000 * sequences
    for index in reversed(range(0, len(walked), 3)):
        assert order.turn(index) == walked[index]
    for index in (0, 1, 150 * sequences, 151 * sequences, 151 * sequences + 1, 301 * sequences, len(walked)):
        counted = Counter(corpus for corpus, _ in walked[:index])
        assert order.before(index) == tuple(counted[corpus] for corpus in range(4))


@given(st.lists(st.tuples(st.integers(1, 400), st.sampled_from([None, {"a": 1}, {"c": 1, "d": 3}])), min_size=1))
@settings(max_examples=25, deadline=None)
def test_no_turn_of_a_corpus_is_taken_twice_or_left_out(drawn: list[tuple[int, dict[str, float] | None]]) -> None:
    stages, last = [], 0
    for steps, mixture in drawn:
        last += steps
        stages.append(stage(last, mixture))
    order = SampleOrder(SEED, segments_of(WEIGHTS, stages, 2))
    taken = [order.turn(index) for index in range(2 * last)]
    for corpus in range(4):
        turns = [turn for c, turn in taken if c == corpus]
        assert turns == list(range(len(turns)))


def test_weights_begin_at_the_first_step_of_their_stage_and_hold_in_every_block() -> None:
    order = SampleOrder(SEED, segments_of(WEIGHTS, [stage(10), stage(5000, {"d": 1, "a": 3})], 8))
    assert 3 not in {order.turn(index)[0] for index in range(80)}
    for block in range(3):
        found = Counter(order.turn(80 + block * BLOCK + i)[0] for i in range(BLOCK))
        assert found == {0: 768, 3: 256}


def test_a_later_stage_changes_nothing_before_it_and_equal_weights_change_nothing_at_all() -> None:
    one = SampleOrder(SEED, segments_of(WEIGHTS, [], 4))
    same = SampleOrder(SEED, segments_of(WEIGHTS, [stage(10), stage(700, {"a": 5, "b": 3, "c": 2})], 4))
    other = SampleOrder(SEED, segments_of(WEIGHTS, [stage(600), stage(700, {"b": 1})], 4))
    for index in range(0, 2400, 7):
        assert one.turn(index) == same.turn(index) == other.turn(index)
    assert other.turn(2400)[0] == 1
    assert len(same.segments) == 1


def test_what_is_needed_from_a_sample_on() -> None:
    order = SampleOrder(SEED, segments_of(WEIGHTS, [stage(10), stage(20, {"d": 1}), stage(30, {"a": 1})], 2))
    assert order.needed(0) == [True, True, True, True]
    assert order.needed(20) == [True, False, False, True]
    assert order.needed(40) == [True, False, False, False]


def test_corpora_that_are_trained_on() -> None:
    assert trained_corpora(WEIGHTS, []) == ["a", "b", "c"]
    assert trained_corpora(WEIGHTS, [stage(1), stage(2, {"d": 1, "a": 0})]) == ["a", "b", "c", "d"]
    assert trained_corpora(WEIGHTS, [stage(1, {"d": 1, "a": 0})]) == ["d"]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("{python-cod: 1}", "unknown corpus 'python-cod'; did you mean 'python-code'?"),
        ("{wikipedia: 1}", "unknown corpus 'wikipedia'; data.sources has python-code, package-docs, code-instructions"),
        ("{python-code: -1, package-docs: 2}", "greater than or equal to 0"),
        ("{python-code: 0}", "the weights of all corpora are 0"),
        ("{}", "the weights of all corpora are 0"),
        ("{python-code: 1, package-docs: 0.0001}", "'package-docs': weight=0.0001 is less than 1/1024"),
        ("{python-code: .nan}", "finite number"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixture: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        recipes.load("tiny", [f"train.stages.2.mixture={mixture}"])
    assert message in str(caught.value)
    assert "stages" in str(caught.value)
    assert "mixture" in str(caught.value)


def test_a_source_of_weight_0_may_be_trained_on_by_a_stage_alone() -> None:
    recipe = recipes.load("tiny", ["data.sources.2.weight=0", "train.stages.3.mixture={code-instructions: 1}"])
    weights = {s.name: s.weight for s in recipe.data.sources}
    assert trained_corpora(weights, recipe.train.stages) == list(weights)
    assert list(islice((s.mixture for s in recipe.train.stages), 3)) == [None] * 3
