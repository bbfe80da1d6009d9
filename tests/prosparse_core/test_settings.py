"""Rows of the paper's tables: equal tokens, shared beginnings, and what each setting changes."""

from __future__ import annotations

import typing

import pytest

from prosparse_core import recipe as recipes
from prosparse_core import settings
from prosparse_core.errors import BadInput
from prosparse_core.schedule import l1_lambda

EVERYTHING = [
    f"compare.settings=[{', '.join(settings.SETTINGS)}]",
    "compare.shift=0.1",
    "compare.target_sparsity=0.75",
    "compare.distill={weight: 1.0, temperature: 2.0}",
    "compare.distill_slowdown=1.5",
    "compare.fixed_l1=[0.1, 0.2]",
    "compare.seeds={fixed_l1: [1], prosparse: [1, 2]}",
]


def test_every_setting_a_recipe_may_name_has_an_entry() -> None:
    assert set(typing.get_args(recipes.SettingName)) == set(settings.SETTINGS)


def test_all_trained_rows_see_the_same_tokens_and_share_the_learning_rate() -> None:
    recipe = recipes.load("tiny", EVERYTHING)
    rows = settings.rows(recipe)
    assert {r.setting for r in rows} == set(settings.SETTINGS)
    trained = [r.train for r in rows if r.train is not None and r.setting != "distilled_equal_time"]
    assert {t.total_tokens for t in trained} == {recipe.train.total_tokens}
    assert {(t.lr, t.warmup_steps, t.tokens_per_step) for t in trained} == {(3e-3, 5, 512)}
    assert {t.stages[0].until_step for t in trained} == {20}


def test_factors_and_seeds_make_rows() -> None:
    rows = settings.rows(recipes.load("tiny", EVERYTHING))
    fixed = [(r.train.stages[-1].l1, r.seed) for r in rows if r.setting == "fixed_l1" and r.train]
    assert fixed == [(0.1, None), (0.1, 1), (0.2, None), (0.2, 1)]
    assert [(r.seed, r.thresholds) for r in rows if r.setting == "prosparse"] == [(None, True), (1, True), (2, True)]
    assert [r.note for r in rows if r.setting == "fixed_l1"][1] == "fixed_l1 0.1 · seed 1"


def test_what_each_setting_changes() -> None:
    recipe = recipes.load("tiny", EVERYTHING)
    by_name = {r.setting: r.train for r in settings.rows(recipe) if r.train}
    assert by_name["prosparse"] == by_name["prosparse_star"] == recipe.train
    assert by_name["original_continued"].activation == "original"
    assert (by_name["shifted_relu"].activation, by_name["shifted_relu"].shift) == ("shifted_relu", 0.1)
    assert by_name["drelu"].activation == "drelu"
    for name in ("original_continued", "vanilla_relu", "shifted_relu"):
        assert {l1_lambda(by_name[name].stages, s) for s in range(1, 61)} == {0.0}
    fixed = by_name["fixed_l1"].stages
    assert [l1_lambda(fixed, s) for s in (20, 21, 60)] == [0.0, 0.2, 0.2]
    assert [s.ramp for s in by_name["linear_ramp"].stages] == ["constant", "constant", "linear", "linear"]
    assert by_name["exponential_ramp"].stages[-1].ramp == "exponential"
    assert all(s.distill and s.distill.temperature == 2 for s in by_name["distilled"].stages)
    assert [s.target_sparsity for s in by_name["closed_loop"].stages] == [None, 0.75]
    shorter = by_name["distilled_equal_time"]
    assert [s.until_step for s in recipe.train.stages] == [20, 25, 45, 60]
    assert [s.until_step for s in shorter.stages] == [13, 17, 30, 40]
    assert all(s.distill for s in shorter.stages)


def test_the_default_fixed_factor_is_the_last_of_the_stages() -> None:
    rows = settings.rows(recipes.load("tiny", ["compare.settings=[fixed_l1]"]))
    assert [r.train.stages[-1].l1 for r in rows if r.train] == [0.2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare={settings: [shifted_relu]}", "shifted_relu needs compare.shift"),
        ("compare={settings: [closed_loop]}", "closed_loop needs compare.target_sparsity"),
        ("compare={settings: [distilled]}", "distilled needs compare.distill"),
        (
            "compare={settings: [distilled_equal_time], distill: {weight: 1.0}}",
            "distilled_equal_time needs compare.distill_slowdown",
        ),
        ("compare.settings=[prosparse_sta]", "did you mean 'prosparse_star'?"),
        ("compare.fixed_l1=[0.1, 0.1]", "each once"),
        ("compare.seeds={drelu: [1]}", "seeds of drelu, which compare.settings does not name"),
        ("train.shift=0.1", "activation: shifted_relu and shift go together"),
        ("train.stages.1.target_sparsity=0.5", "give either l1 or target_sparsity"),
        ("train.stages.3.ramp=exponentail", "did you mean 'exponential'?"),
    ],
)
def test_a_setting_that_needs_what_the_recipe_lacks_is_refused(override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        recipes.load("tiny", [override])
    assert message in str(caught.value)


def test_what_rows_have_in_common_is_counted_once() -> None:
    recipe = recipes.load("tiny", ["compare.settings=[original, vanilla_relu, prosparse_star, prosparse]"])
    # stage 0 (20 steps) once; 40 more for vanilla_relu, 40 more for the stages of prosparse; its thresholds are free
    shared = settings.training_of(settings.rows(recipe), recipe.seed)
    assert (shared.num_stages, shared.num_last, shared.tokens) == (1 + 1 + 3, 2, (20 + 40 + 40) * 512)
    again = recipes.load("tiny", ["compare.settings=[prosparse]", "compare.seeds={prosparse: [7]}"])
    shared = settings.training_of(settings.rows(again), again.seed)
    assert (shared.num_stages, shared.num_last, shared.tokens) == (1 + 3 + 3, 2, (20 + 40 + 40) * 512)
