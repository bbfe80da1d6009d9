"""Rows of the paper's tables: equal tokens, shared beginnings, and what each setting changes."""

from __future__ import annotations

import typing
from itertools import pairwise
from typing import Any

import pytest

from prosparse_core import recipe as recipes
from prosparse_core import settings
from prosparse_core.errors import BadInput
from prosparse_core.schedule import l1_lambda, learning_rate
from prosparse_core.shares import segments_of

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
    assert {r.setting for r in rows if not r.setting.endswith("_fatrelu")} == set(settings.SETTINGS)
    trained = [r.train for r in rows if r.train is not None and "equal_time" not in r.setting]
    assert {t.total_tokens for t in trained} == {recipe.train.total_tokens}
    assert {(t.lr, t.warmup_steps, t.tokens_per_step) for t in trained} == {(3e-3, 5, 512)}
    assert {t.stages[0].until_step for t in trained} == {20}


def test_factors_and_seeds_make_rows() -> None:
    rows = settings.rows(recipes.load("tiny", EVERYTHING))
    fixed = [(r.train.stages[-1].l1, r.seed) for r in rows if r.setting == "fixed_l1" and r.train]
    assert fixed == [(0.1, None), (0.1, 1), (0.2, None), (0.2, 1)]
    assert [r.seed for r in rows if r.setting == "prosparse"] == [None, 1, 2]
    assert {r.thresholds_of for r in rows if r.setting == "prosparse"} == {"prosparse_star"}
    assert [r.note for r in rows if r.setting == "fixed_l1"][1] == "fixed_l1 0.1 · seed 1"


def test_thresholds_are_calibrated_for_every_setting_that_runs_relu() -> None:
    """Else those with them have more zeros than what they stand beside, for no reason of their own."""
    rows = settings.rows(recipes.load("tiny", EVERYTHING))
    plain = {r.setting for r in rows if r.train and r.train.activation == "relu" and not r.thresholds_of}
    shifted = {r.thresholds_of for r in rows if r.thresholds_of}
    assert shifted == plain
    assert shifted == set(settings.SETTINGS) - {"original", "original_continued", "shifted_relu", "drelu", "prosparse"}
    for before, after in pairwise(rows):
        if after.thresholds_of and after.setting != "prosparse":
            assert (before.setting, before.train, before.seed) == (after.thresholds_of, after.train, after.seed)
            assert after.setting == f"{before.setting}_fatrelu"
    of_one = settings.rows(recipes.load("tiny", [*EVERYTHING, "compare.thresholds=false"]))
    assert {r.setting for r in of_one if r.thresholds_of} == {"prosparse"}
    assert settings.training_of(rows, 42) == settings.training_of(of_one, 42), "thresholds train nothing"


def test_both_arms_end_at_the_same_factors() -> None:
    recipe = recipes.load(
        "tiny", ["compare.settings=[fixed_l1, prosparse_star, prosparse]", "compare.final_l1=[0.1, 0.2, 0.4]"]
    )
    by_setting: dict[str, list[float]] = {}
    for row in settings.rows(recipe):
        assert row.train is not None
        by_setting.setdefault(row.setting, []).append(row.train.stages[-1].l1)
    assert by_setting == {s: [0.1, 0.2, 0.4] for s in ("fixed_l1", "fixed_l1_fatrelu", "prosparse_star", "prosparse")}
    stars = [r.train for r in settings.rows(recipe) if r.setting == "prosparse_star" and r.train]
    assert stars[1] == recipe.train, "the recipe's own last factor leaves its stages as they are"
    for train, scale in zip(stars, (0.5, 1, 2), strict=True):
        for step in range(1, 61):
            assert l1_lambda(train.stages, step) == pytest.approx(scale * l1_lambda(recipe.train.stages, step))
    notes = [r.note for r in settings.rows(recipe) if "prosparse" in r.setting]
    assert notes[:3] == ["prosparse_star 0.1", "prosparse 0.1", "prosparse_star 0.2"]


def test_factors_of_the_fixed_arm_alone_come_first() -> None:
    recipe = recipes.load("tiny", ["compare.settings=[fixed_l1]", "compare.final_l1=[0.2]", "compare.fixed_l1=[0.3]"])
    assert [r.train.stages[-1].l1 for r in settings.rows(recipe) if r.train] == [0.3, 0.3]


@pytest.mark.parametrize("stages", ["[{until_step: 4, l1: 0}, {until_step: 8, target_sparsity: 0.5}]",
                                    "[{until_step: 4, l1: 0}, {until_step: 8, l1: 0}]"])  # fmt: skip
def test_what_has_no_last_factor_is_not_scaled(stages: str) -> None:
    overrides = [f"train.stages={stages}", "compare.settings=[prosparse_star]", "compare.final_l1=[0.2]"]
    with pytest.raises(BadInput, match=r"compare.final_l1: the last stage's lambda .* is 0 or steered"):
        settings.rows(recipes.load("tiny", overrides))


def test_seeds_share_no_stage() -> None:
    """A seed is a data order from the first step on: what it repeats is the whole training."""
    recipe = recipes.load("tiny", ["compare.settings=[vanilla_relu, prosparse_star]",
                                   "compare.seeds={vanilla_relu: [7], prosparse_star: [7]}"])  # fmt: skip
    by_seed: dict[int | None, list[set[str]]] = {}
    for row in settings.rows(recipe):
        by_seed.setdefault(row.seed, []).append(set(settings.course(row, recipe.seed)))
    own, other = ([set.union(*courses), set.intersection(*courses)] for courses in (by_seed[None], by_seed[7]))
    assert not own[0] & other[0]
    assert len(own[1]) == len(other[1]) == 1, "settings of one seed share stage 0"


def test_a_further_seed_is_another_one() -> None:
    recipe = recipes.load("tiny", ["compare.settings=[vanilla_relu]", "compare.seeds={vanilla_relu: [42]}"])
    with pytest.raises(BadInput, match="vanilla_relu has the recipe's own seed 42 once more"):
        settings.rows(recipe)


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
    assert {r.train.stages[-1].l1 for r in rows if r.train} == {0.2}


def test_the_comparison_of_smollm_has_both_arms_at_the_same_factors_and_seeds() -> None:
    recipe = recipes.load("smollm2-135m-compare")
    last: dict[str, set[tuple[int | None, float]]] = {}
    for row in settings.rows(recipe):
        if row.train:
            last.setdefault(row.setting, set()).add((row.seed, row.train.stages[-1].l1))
    assert last["fixed_l1"] == last["prosparse_star"] == last["fixed_l1_fatrelu"] == last["prosparse"]
    seeds = {seed for seed, _ in last["fixed_l1"]}
    assert len(seeds) >= 3, "an interval of two pairs is wider than any difference"
    assert seeds == {seed for seed, _ in last["vanilla_relu"]}, "the factor 0 of both arms"
    assert len({l1 for _, l1 in last["fixed_l1"]}) >= 3
    made = {row.note: row.train for row in settings.rows(recipe) if row.train}
    first = {"until_step": 40, "l1": 0.0}
    for note, one in (("fixed_l1 1", {"l1": 1.0}), ("closed_loop", {"l1": 0.0, "target_sparsity": 0.75}),
                      ("vanilla_relu", {"l1": 0.0}), ("shifted_relu", {"l1": 0.0})):  # fmt: skip
        stages = [s.model_dump(exclude_defaults=True) for s in made[note].stages]
        assert stages == [first, {"until_step": 120, **one}]


TEACHER = "distill: {weight: 1.0, temperature: 2.0}"


def stages_of(name: str, stages: str, *more: str) -> list[Any]:
    """The stages of every row of a setting, made of tiny with other stages."""
    overrides = [f"train.stages={stages}", f"compare.settings=[{name}]", *EVERYTHING[1:-1], *more]
    rows = settings.rows(recipes.load("tiny", overrides))
    return [r.train.stages for r in rows if r.train and r.setting == name]


ONE_STAGE = ["original_continued", "vanilla_relu", "shifted_relu", "fixed_l1", "closed_loop"]


@pytest.mark.parametrize("name", ONE_STAGE)
@pytest.mark.parametrize("stage_0", [None, 2.0])
def test_the_one_stage_has_the_teacher_of_those_it_stands_for(name: str, stage_0: float | None) -> None:
    beginning = f", {TEACHER}" if stage_0 else ""
    stages = f"[{{until_step: 4, l1: 0{beginning}}}, {{until_step: 5, l1: 0.1, {TEACHER}}}, "
    stages += f"{{until_step: 8, l1: 1.0, ramp: sine, {TEACHER}}}]"
    assert [s.distill is not None for s in stages_of("prosparse_star", stages)[0]] == [bool(stage_0), True, True]
    for made in stages_of(name, stages):
        assert [(s.until_step, s.distill and s.distill.temperature) for s in made] == [(4, stage_0), (8, 2.0)]


@pytest.mark.parametrize("name", ONE_STAGE)
def test_where_the_teacher_changes_so_does_the_rows(name: str) -> None:
    stages = f"[{{until_step: 4, l1: 0}}, {{until_step: 5, l1: 0.1, {TEACHER}}}, "
    stages += "{until_step: 8, l1: 1.0, ramp: sine}, {until_step: 9, l1: 1.0}]"
    for made in stages_of(name, stages):
        assert [(s.until_step, s.distill is not None) for s in made] == [(4, False), (5, True), (9, False)]
        assert len({(s.l1, s.target_sparsity) for s in made[1:]}) == 1
    assert len(stages_of("prosparse_star", stages)[0]) == 4


WSD = """[{until_step: 4, l1: 0}, {until_step: 6, l1: 0.1}, {until_step: 9, l1: 0.5, ramp: sine},
  {until_step: 12, l1: 1.0, ramp: sine, lr: 2.0e-3, warmup_steps: 2},
  {until_step: 16, l1: 1.0, phase: decay, half_life: 3, mixture: {python-code: 1, code-instructions: 1}},
  {until_step: 18, l1: 1.0, phase: decay, lr: 1.0e-4},
  {until_step: 24, l1: 0.2, phase: sft, lr: 5.0e-4, warmup_steps: 2, mixture: {code-instructions: 1}}]"""


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("name", [n for n in settings.SETTINGS if n not in ("original", "distilled_equal_time")])
def test_every_setting_has_the_recipes_learning_rate_and_corpora_at_each_step(name: str, schedule: str) -> None:
    more = [f"train.schedule={schedule}", "train.warmup_steps=3"]
    plain = WSD if schedule == "wsd" else WSD.replace("half_life: 3, ", "")
    own = recipes.load("tiny", [f"train.stages={plain}", *more]).train
    weights = {"python-code": 0.5, "package-docs": 0.25, "code-instructions": 0.25}
    for row in settings.rows(
        recipes.load("tiny", [f"train.stages={plain}", f"compare.settings=[{name}]", *EVERYTHING[1:-1], *more])
    ):
        assert row.train is not None
        assert row.train.total_tokens == own.total_tokens
        for step in range(1, 25):
            assert learning_rate(row.train, step) == learning_rate(own, step), step
        assert segments_of(weights, row.train.stages, 8) == segments_of(weights, own.stages, 8)
        if name in ONE_STAGE and schedule == "wsd":
            assert [s.until_step for s in row.train.stages] == [4, 9, 12, 16, 18, 24]
            assert len({(s.l1, s.target_sparsity) for s in row.train.stages[1:5]}) == 1


def test_scaled_stages_keep_all_but_lambda() -> None:
    overrides = [f"train.stages={WSD}", "train.schedule=wsd", "compare.settings=[prosparse_star]"]
    own = recipes.load("tiny", overrides).train
    for row in settings.rows(recipes.load("tiny", [*overrides, "compare.final_l1=[0.5, 2.0]"])):
        assert row.train is not None
        assert row.factor in (0.5, 2.0)
        for made, stage in zip(row.train.stages, own.stages, strict=True):
            assert made == stage.model_copy(update={"l1": made.l1})
            assert made.l1 == pytest.approx(stage.l1 * row.factor), "the last before phase: sft is 1"


def test_equal_time_shortens_the_warm_up_and_the_half_life_too() -> None:
    (made,) = stages_of("distilled_equal_time", WSD, "train.schedule=wsd")
    assert (made[3].warmup_steps, made[4].half_life) == (1, 2.0)


SFT = "[{until_step: 4, l1: 0}, {until_step: 5, l1: 0.1}, {until_step: 8, l1: 1.0, ramp: sine}, "
SFT += f"{{until_step: 9, l1: 0.2, phase: sft, {TEACHER}}}, {{until_step: 12, l1: 0.2, phase: sft}}]"


def test_ending_sft_stages_stay_and_the_default_factor_is_the_last_before_them() -> None:
    own = stages_of("prosparse_star", SFT)[0]
    (fixed,) = stages_of("fixed_l1", SFT, "compare.fixed_l1=[]")
    assert [(s.until_step, s.l1, s.phase) for s in fixed[:2]] == [(4, 0, "prosparse"), (8, 1.0, "prosparse")]
    assert fixed[2:] == own[3:]
    row = settings.rows(recipes.load("tiny", [f"train.stages={SFT}", "compare.settings=[fixed_l1]"]))[0]
    assert row.note == "fixed_l1 1"


def test_an_sft_stage_lowers_every_lambda_by_the_same_ratio() -> None:
    """The ledger tells rows of a setting apart by lambda at their end: two factors must not end in one."""
    by_factor = [[s.l1 for s in made] for made in stages_of("fixed_l1", SFT)]
    assert by_factor == [
        [0, 0.1, pytest.approx(0.02), pytest.approx(0.02)],
        [0, 0.2, pytest.approx(0.04), pytest.approx(0.04)],
    ]
    for name in ("original_continued", "vanilla_relu", "shifted_relu"):
        (made,) = stages_of(name, SFT)
        assert [(s.until_step, s.l1, s.phase) for s in made] == [
            (4, 0, "prosparse"), (8, 0, "prosparse"), (9, 0, "sft"), (12, 0, "sft"),
        ]  # fmt: skip
        assert [s.distill is None for s in made] == [True, True, False, True]
    (steered,) = stages_of("closed_loop", SFT)
    assert [(s.until_step, s.target_sparsity, s.phase) for s in steered[1:]] == [
        (8, 0.75, "prosparse"), (9, 0.75, "sft"), (12, 0.75, "sft"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        # Nothing but sft after stage 0, and lambdas that have no ratio: the factor goes on.
        ("[{until_step: 4, l1: 0}, {until_step: 8, l1: 0.3, phase: sft}]", [0, 0.1]),
        (
            "[{until_step: 4, l1: 0}, {until_step: 8, target_sparsity: 0.5}, "
            "{until_step: 9, target_sparsity: 0.6, phase: sft}]",
            [0, 0.1, 0.1],
        ),
        (
            "[{until_step: 4, l1: 0}, {until_step: 8, l1: 0.5}, {until_step: 9, target_sparsity: 0.6, phase: sft}]",
            [0, 0.1, 0.1],
        ),
        # An sft stage before others is one of those that are replaced.
        (
            "[{until_step: 4, l1: 0}, {until_step: 8, l1: 0.5}, {until_step: 9, l1: 0.1, phase: sft}, "
            "{until_step: 12, l1: 0.2, ramp: sine}]",
            [0, 0.1],
        ),
    ],
)
def test_a_given_factor_where_the_recipe_has_no_ratio(stages: str, expected: list[float]) -> None:
    made = stages_of("fixed_l1", stages)[0]
    assert [s.l1 for s in made] == expected
    assert made[-1].until_step == recipes.load("tiny", [f"train.stages={stages}"]).train.total_steps


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
    assert (shared.num_stages, shared.num_last, shared.tokens) == (4 + 4, 2, 2 * 60 * 512)
