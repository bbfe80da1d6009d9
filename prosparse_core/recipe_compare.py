"""The part of a recipe that says which settings are compared: rows of the paper's tables under equal tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from prosparse_core.recipe_train import Distill, Section

if TYPE_CHECKING:
    from prosparse_core.recipe import Model

SettingName = Literal[
    "original",
    "original_continued",
    "vanilla_relu",
    "shifted_relu",
    "fixed_l1",
    "prosparse_star",
    "prosparse",
    "linear_ramp",
    "exponential_ramp",
    "drelu",
    "distilled",
    "distilled_equal_time",
    "closed_loop",
]


class Imported(Section):
    """A checkpoint somebody else trained, to be evaluated beside ours (and calibrated, if it is a ReLU model)."""

    setting: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """The name of its row, such as relullama."""
    id: str | None = None
    """The name of the model in the ledger; default: the last part of its source. ``model.id`` files it under the
    recipe's model, ``llama2-13b`` sets it beside the paper's numbers for that one."""
    source: str
    """As ``model.source``."""
    revision: str | None = None
    activation: Literal["original", "relu"] = "relu"
    """relu: it was trained with ReLU (its config must say so, or FATReLU), and thresholds are calibrated for it too.
    original: whatever its config says, with thresholds or a shift where that has them."""

    @property
    def model(self) -> Model:
        """Where it comes from, under its own name."""
        from prosparse_core.recipe import Model

        place = re.sub("^(package|random):", "", self.source)
        name = Path(place).expanduser().resolve().name.removesuffix(".gguf")
        return Model(id=self.id or name or self.setting, source=self.source, revision=self.revision)


class Compare(Section):
    """Which settings ``prosparse compare`` trains under equal tokens and in the same data order (paper, Table 1)."""

    settings: list[SettingName] = [
        "original",
        "original_continued",
        "vanilla_relu",
        "fixed_l1",
        "prosparse_star",
        "prosparse",
    ]
    shift: float | None = Field(default=None, gt=0)
    """b of shifted_relu."""
    final_l1: list[float] = []
    """Last factors of both arms, one row each: of prosparse_star and prosparse, whose stages are scaled so that lambda
    ends there (``phase: sft`` by its own ratio), and of fixed_l1. Default: the stages as they are."""
    fixed_l1: list[float] = []
    """Factors of fixed_l1 alone, one row each; default: ``final_l1``, else the last factor of the stages."""
    thresholds: bool = True
    """Calibrate thresholds for every setting that runs ReLU, and measure it without and with them; false: for
    prosparse alone, which then has more zeros than those it stands beside."""
    target_sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Where closed_loop steers to, before thresholds."""
    distill: Distill | None = None
    """How distilled learns from the dense original."""
    distill_slowdown: float | None = Field(default=None, gt=1)
    """How many times as long a step of distilled takes: distilled_equal_time has that many times fewer steps."""
    seeds: dict[SettingName, list[int]] = {}
    """Further seeds of some settings: data orders from the first step on. Settings share beginnings within a seed."""
    imported: list[Imported] = []

    @field_validator("final_l1", "fixed_l1")
    @classmethod
    def _factors(cls, factors: list[float]) -> list[float]:
        if any(f <= 0 for f in factors) or len(set(factors)) < len(factors):
            raise ValueError("factors above 0, each once")
        return factors

    @model_validator(mode="after")
    def _complete(self) -> Compare:
        needs = [
            ("shifted_relu", "shift"),
            ("closed_loop", "target_sparsity"),
            ("distilled", "distill"),
            ("distilled_equal_time", "distill"),
            ("distilled_equal_time", "distill_slowdown"),
        ]
        missing = [f"{s} needs compare.{key}" for s, key in needs if s in self.settings and not getattr(self, key)]
        if missing:
            raise ValueError("; ".join(missing))
        absent = [s for s in self.seeds if s not in self.settings]
        if absent:
            raise ValueError(f"seeds of {', '.join(absent)}, which compare.settings does not name")
        return self
