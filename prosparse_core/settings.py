"""The rows of the paper's tables as variations of one recipe: same tokens, same data order, another way to sparsity.

A new setting is one entry in ``SETTINGS`` (and its name in ``recipe.SettingName``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from prosparse_core.errors import BadInput
from prosparse_core.recipe import Recipe
from prosparse_core.recipe_train import Stage, Train
from prosparse_core.store import canonical_json

FATRELU = "_fatrelu"
"""Ends the name of a setting measured with calibrated thresholds; with them prosparse_star is prosparse."""


def with_thresholds(setting: str) -> str:
    """What a setting is called once thresholds are calibrated for it."""
    return "prosparse" if setting == "prosparse_star" else setting + FATRELU


@dataclass(frozen=True)
class Row:
    """One row to be trained (or not) and measured."""

    setting: str
    train: Train | None
    """None: the dense model as it came."""
    thresholds_of: str | None = None
    """The setting before thresholds, where this row is what they make of it."""
    seed: int | None = None
    """Data order, from the first step on; None is the recipe's seed."""
    factor: float | None = None
    """The last lambda (before an ending ``phase: sft``), where a setting has a row for each of several."""

    @property
    def note(self) -> str:
        """What tells the row from others in progress lines."""
        factor = "" if self.factor is None else f" {self.factor:g}"
        return f"{self.setting}{factor}" + ("" if self.seed is None else f" · seed {self.seed}")


def rows(recipe: Recipe) -> list[Row]:
    """Every row that ``recipe.compare`` asks for, in its order: further seeds directly after the first, and what
    thresholds make of a row directly after it.

    Raises:
        BadInput: a setting that cannot be made of the recipe's stages, or a further seed that is the recipe's own.
    """
    found: dict[tuple[str, float | None, int | None], Row] = {}
    for name in recipe.compare.settings:
        if recipe.seed in recipe.compare.seeds.get(name, []):
            raise BadInput(
                f"compare.seeds: {name} has the recipe's own seed {recipe.seed} once more",
                hint="further seeds are other ones",
            )
        seeds: list[int | None] = [None, *recipe.compare.seeds.get(name, [])]
        try:
            trains = SETTINGS[name](recipe)
        except ValidationError as error:
            said = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
            raise BadInput(
                f"compare.settings: {name} cannot be made of the stages of {recipe.name}: {said}",
                hint="change train.stages, or leave the setting out of compare.settings",
            ) from None
        if name == "prosparse":
            require_relu(recipe)
        for train in trains:
            factor = _factor(train) if name == "fixed_l1" or len(trains) > 1 else None
            for seed in seeds:
                for row in _with_and_without(name, train, seed, factor, recipe.compare.thresholds):
                    found.setdefault((row.setting, row.factor, row.seed), row)
    return list(found.values())


def _with_and_without(
    name: str, train: Train | None, seed: int | None, factor: float | None, thresholds: bool
) -> list[Row]:
    """A row and what thresholds make of it: FATReLU takes the place of ReLU and of nothing else."""
    if name == "prosparse":
        return [Row(name, train, "prosparse_star", seed, factor)]
    plain = [Row(name, train, None, seed, factor)]
    if not thresholds or train is None or train.activation != "relu":
        return plain
    return [*plain, Row(with_thresholds(name), train, name, seed, factor)]


def _factor(train: Train | None) -> float | None:
    return None if train is None else train.stages[_first_sft(train.stages) - 1].l1


def require_relu(recipe: Recipe) -> None:
    """Refuse to calibrate what FATReLU does not stand for: its zeros are those of ReLU and more (paper, eq. 6).

    Raises:
        BadInput: the recipe trains another activation.
    """
    if recipe.train.activation != "relu":
        raise BadInput(
            f"train.activation={recipe.train.activation!r}: thresholds are calibrated for FATReLU, which takes the "
            "place of relu",
            hint="prosparse compare trains and measures other activations: compare.settings=[drelu, shifted_relu, ...]",
        )


@dataclass(frozen=True)
class Trained:
    """What rows train together; what they have in common counts once."""

    num_stages: int
    num_last: int
    """Stages that none goes on from."""
    tokens: int


def training_of(rows: list[Row], seed: int) -> Trained:
    """What all rows together train."""
    stages: dict[str, int] = {}
    for row in rows:
        for index, key in enumerate(course(row, seed)):
            assert row.train is not None
            before = row.train.stages[index - 1].until_step if index else 0
            stages[key] = (row.train.stages[index].until_step - before) * row.train.tokens_per_step
    num_last = len(set(stages) - continued(rows, seed))
    return Trained(len(stages), num_last, sum(stages.values()))


def course(row: Row, seed: int) -> list[str]:
    """A name for what each stage of a row leaves: two rows that have it in common train the stage once."""
    if row.train is None:
        return []
    like = row.train.model_dump(mode="json", exclude={"stages"})
    stages = [s.model_dump(mode="json") for s in row.train.stages]
    order = seed if row.seed is None else row.seed
    return [canonical_json([like, stages[: index + 1], order]) for index in range(len(stages))]


def continued(rows: list[Row], seed: int) -> set[str]:
    """The stages, as :func:`course` names them, that a later stage of some row goes on from."""
    return {key for row in rows for key in course(row, seed)[:-1]}


def _dense(recipe: Recipe) -> list[Train | None]:
    return [None]


def _progressive(recipe: Recipe) -> list[Train | None]:
    """The recipe's stages, or for each of ``compare.final_l1`` the same course of lambda scaled to end there."""
    train = recipe.train
    last = _factor(train)
    if not recipe.compare.final_l1:
        return [train]
    if not last:
        raise BadInput(
            "compare.final_l1: the last stage's lambda (before phase: sft) is 0 or steered: it cannot be scaled",
            hint="give train.stages an l1, or leave out compare.final_l1",
        )
    scales = {final: final / last for final in recipe.compare.final_l1}
    return [
        train
        if final == last
        else _varied(train, [{**s.model_dump(), "l1": _scaled(s.l1, last, final, scale)} for s in train.stages])
        for final, scale in scales.items()
    ]


def _scaled(l1: float, last: float, final: float, scale: float) -> float:
    """The last lambda is exactly the one asked for, whatever the product rounds to."""
    return final if l1 == last else l1 * scale


def _activation(**changes: Any) -> Callable[[Recipe], list[Train | None]]:
    """No regularization at all, with an activation of its own."""

    def train(recipe: Recipe) -> list[Train | None]:
        shift = {"shift": recipe.compare.shift} if changes["activation"] == "shifted_relu" else {}
        return [_varied(recipe.train, _in_one_stage(recipe.train, l1=0.0), **changes, **shift)]

    return train


def _fixed(recipe: Recipe) -> list[Train | None]:
    """A constant factor from the end of stage 0 (paper, section 4.1): the foil of progressive factors."""
    stages = recipe.train.stages
    factors = recipe.compare.fixed_l1 or recipe.compare.final_l1 or [stages[_first_sft(stages) - 1].l1]
    if not all(factors):
        raise BadInput(
            "compare.settings: fixed_l1 has no factor: the last stage's lambda (before phase: sft) is 0 or steered",
            hint="give factors, such as compare.fixed_l1=[0.3]",
        )
    return [_varied(recipe.train, _in_one_stage(recipe.train, l1=factor)) for factor in factors]


def _ramp(shape: str) -> Callable[[Recipe], list[Train | None]]:
    """The recipe's stages with another course of lambda where it rises along a sine."""

    def train(recipe: Recipe) -> list[Train | None]:
        stages = [{**s.model_dump(), "ramp": shape if s.ramp != "constant" else s.ramp} for s in recipe.train.stages]
        return [_varied(recipe.train, stages)]

    return train


def _drelu(recipe: Recipe) -> list[Train | None]:
    return [_varied(recipe.train, [s.model_dump() for s in recipe.train.stages], activation="drelu")]


def _distilled(recipe: Recipe) -> list[Train | None]:
    assert recipe.compare.distill is not None
    teach = recipe.compare.distill.model_dump()
    return [_varied(recipe.train, [{**s.model_dump(), "distill": teach} for s in recipe.train.stages])]


def _distilled_equal_time(recipe: Recipe) -> list[Train | None]:
    """The stages of distilled, shortened until they take as long as the same stages without a teacher."""
    slowdown = recipe.compare.distill_slowdown
    assert recipe.compare.distill is not None
    assert slowdown is not None
    teach, stages, last = recipe.compare.distill.model_dump(), [], 0
    for stage in recipe.train.stages:
        last = max(last + 1, round(stage.until_step / slowdown))
        warmup, half_life = round(stage.warmup_steps / slowdown), stage.half_life and stage.half_life / slowdown
        shorter = {"until_step": last, "warmup_steps": warmup, "half_life": half_life}
        stages.append({**stage.model_dump(), **shorter, "distill": teach})
    return [_varied(recipe.train, stages)]


def _closed_loop(recipe: Recipe) -> list[Train | None]:
    return [_varied(recipe.train, _in_one_stage(recipe.train, target_sparsity=recipe.compare.target_sparsity))]


def _in_one_stage(train: Train, **regularized: float | None) -> list[dict[str, Any]]:
    """Stage 0 as it is, one stage (``l1`` or ``target_sparsity``) for those after it, and the ending ones of phase sft.

    Everything else is as in the recipe at every step, so that a row differs from the recipe's stages by lambda alone:
    teacher, corpora and learning rate. Where these change among the stages that are replaced, so do the row's: it then
    has a stage from each change on, all of one lambda. In an sft stage lambda changes by the recipe's own ratio: the
    recipe's last factor becomes the recipe's sft lambda, none stays none, and rows of different factors stay different.
    A steered row is steered to its end.
    """
    stages = train.stages
    end = _first_sft(stages)
    replaced, last = stages[1:end], stages[end - 1]
    made: list[dict[str, Any]] = [stages[0].model_dump()]
    if replaced:
        kept = [_but_lambda(train, stage) for stage in replaced]
        for i, stage in enumerate(replaced):
            follows = i and kept[i] == kept[i - 1] and not stage.warmup_steps and kept[i]["phase"] != "decay"
            if follows:
                made[-1]["until_step"] = stage.until_step
            else:
                own = {"until_step": stage.until_step, "warmup_steps": stage.warmup_steps}
                made.append({**kept[i], **regularized, **own})
    elif end == len(stages):  # nothing to regularize: validation says that the stage is empty
        made.append({"until_step": last.until_step, **regularized})
    return made + [_sft(stage, last.l1, regularized) for stage in stages[end:]]


def _but_lambda(train: Train, stage: Stage) -> dict[str, Any]:
    """What of a stage is not lambda, nor where it begins and ends; the phase only where it tells the rate to fall."""
    falls = train.schedule == "wsd" and (stage.phase == "decay" or stage.half_life is not None)
    kept = stage.model_dump(include={"distill", "mixture", "lr", "half_life"})
    return {**kept, "phase": stage.phase if falls else "prosparse"}


def _first_sft(stages: list[Stage]) -> int:
    """The index from which on all stages are of phase sft; their number where the last is not. Stage 0 never is."""
    return 1 + max((i for i, stage in enumerate(stages) if i and stage.phase != "sft"), default=0)


def _sft(stage: Stage, before: float, regularized: dict[str, float | None]) -> dict[str, Any]:
    """An sft stage under another lambda; ``before`` is the recipe's own at the end of the stage before."""
    kept = stage.model_dump(exclude={"l1", "target_sparsity"})
    factor = regularized.get("l1")
    if not factor:
        return {**kept, **regularized, "ramp": "constant"}
    has_ratio = before and stage.target_sparsity is None
    return {**kept, "l1": stage.l1 * (factor / before) if has_ratio else factor}


def _varied(train: Train, stages: list[dict[str, Any]], **changes: Any) -> Train:
    return Train.model_validate({**train.model_dump(), **changes, "stages": stages})


SETTINGS: dict[str, Callable[[Recipe], list[Train | None]]] = {
    "original": _dense,
    "original_continued": _activation(activation="original"),
    "vanilla_relu": _activation(activation="relu"),
    "shifted_relu": _activation(activation="shifted_relu"),
    "fixed_l1": _fixed,
    "prosparse_star": _progressive,
    "prosparse": _progressive,
    "linear_ramp": _ramp("linear"),
    "exponential_ramp": _ramp("exponential"),
    "drelu": _drelu,
    "distilled": _distilled,
    "distilled_equal_time": _distilled_equal_time,
    "closed_loop": _closed_loop,
}
"""Setting -> its ways to train, one a row."""
