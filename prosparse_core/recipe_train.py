"""The part of a recipe that says how a model is trained: stages, lambda, activation, optimizer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A closed, immutable part of a recipe: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class L1Reduction(Section):
    """How |x1| becomes one number. The paper does not say; the default is sum over layers of the mean over elements."""

    tokens: Literal["mean", "sum"] = "mean"
    d_ff: Literal["mean", "sum"] = "mean"
    layers: Literal["sum", "mean"] = "sum"


class Distill(Section):
    """Learn from the dense original: loss + weight * temperature^2 * KL(original || model), per predicted token."""

    weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)


class Spike(Section):
    """A step whose loss or gradient norm lies far above those of the steps before it, as OLMo-core's SkipStepOptimizer
    tells it: above their mean by more than ``sigma`` standard deviations."""

    sigma: float = Field(default=6.0, gt=0)
    window: int = Field(default=128, ge=4)
    """Steps of the stage, those taken, to compare with; nothing is a spike before half of them are there."""
    action: Literal["skip", "rollback", "ignore"] = "skip"
    """skip: the weights stay as they are, and training goes on with the next step's data. rollback: so do, in
    hindsight, those of ``train.rollback_steps`` steps before it. ignore: it is only recorded."""


class Stage(Section):
    """One regularization stage: ``l1`` is lambda at its end; ``until_step`` is accumulated (paper, Table 6)."""

    until_step: int = Field(gt=0)
    l1: float = Field(ge=0)
    ramp: Literal["constant", "sine", "linear", "exponential"] = "constant"
    """How lambda goes from the stage before to ``l1``; the paper's is sine."""
    target_sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Instead of ``l1``: steer lambda until this share of x1 is zero (before thresholds)."""
    distill: Distill | None = None
    phase: Literal["prosparse", "decay", "sft"] = "prosparse"
    """decay: the learning rate falls, where ``schedule`` is wsd. sft: lambda may be less than before (App. J)."""
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weights of corpora from this stage's first step to its last; a corpus that is not named has none. Default: those
    of ``data.sources``. A corpus goes on where the stage before left off."""
    lr: float | None = Field(default=None, gt=0)
    """The stage's peak learning rate; default: ``train.lr``."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps of the stage in which the learning rate rises linearly from 0; of stage 0, ``train.warmup_steps``."""
    half_life: float | None = Field(default=None, gt=0)
    """Steps in which a falling rate halves: rate = lr * 0.5^(n / half_life) at step n of the fall, and never below lr *
    lr_min_ratio. For schedule wsd and phase decay (default: what ends the stage at lr * lr_min_ratio) or sft (default:
    the rate does not fall). MiniCPM's is 5,000 steps of 4 M tokens (arXiv 2404.06395)."""

    @model_validator(mode="before")
    @classmethod
    def _l1_or_target(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("target_sparsity") is not None:
            if raw.get("l1"):
                raise ValueError("give either l1 or target_sparsity")
            return {**raw, "l1": 0.0}
        return raw

    @field_validator("mixture")
    @classmethod
    def _some_weight(cls, mixture: dict[str, float] | None) -> dict[str, float] | None:
        if mixture is not None and sum(mixture.values()) <= 0:
            raise ValueError("the weights of all corpora are 0: the stage would train on nothing")
        return mixture


class Train(Section):
    """Continual training with progressive sparsity regularization (paper, section 3 and Algorithm 1)."""

    tokens_per_step: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    """Sequences per forward pass; default: the whole step."""
    lr: float = Field(gt=0)
    """The peak learning rate of every stage that has none of its own."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: one over the whole run (paper, App. L). wsd: stable, and falling in stages of phase decay (MiniCPM)."""
    lr_min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the rate ends, as a share of the peak; nothing for schedule constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps of the run in which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    activation: Literal["relu", "shifted_relu", "drelu", "original"] = "relu"
    """What stands in the FFN while training; ``original`` leaves the dense activation where it is."""
    shift: float | None = Field(default=None, gt=0)
    """b of shifted_relu."""
    l1_reduction: L1Reduction = L1Reduction()
    freeze: list[Literal["embeddings"]] = []
    """Weights that stay as they are. The paper trains all; with few tokens AdamW's normalised steps move the rows of
    rare tokens, in the embeddings and the output head, by noise alone."""
    on_non_finite: Literal["skip", "rollback", "fail"] = "skip"
    """What happens at a step whose loss or gradient norm is no finite number; see ``spike.action``. It never reaches
    the weights: fail ends the stage before."""
    spike: Spike | None = None
    """What counts as a loss spike, and what happens then; None: nothing does."""
    rollback_steps: int = Field(default=20, ge=0)
    """A rollback takes back this many steps before the bad one as well, and passes over their data: what made the loss
    rise may lie before it rose (PaLM, arXiv 2204.02311, went back about 100 steps)."""
    max_bad_steps: int = Field(default=10, ge=0)
    """The stage fails at the next bad step after so many, and at the third in a row."""
    stages: list[Stage] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _ordered(cls, stages: list[Stage]) -> list[Stage]:
        problems = []
        if stages[0].l1 != 0 or stages[0].target_sparsity:
            problems.append(f"stages[0].l1={stages[0].l1}: stage 0 only substitutes the activation, its lambda is 0")
        for i, (before, stage) in enumerate(pairwise(stages), start=1):
            if stage.until_step <= before.until_step:
                problems.append(
                    f"stages[{i}].until_step={stage.until_step} must exceed stages[{i - 1}].until_step="
                    f"{before.until_step} (steps are accumulated, not per stage)"
                )
            if stage.target_sparsity or before.target_sparsity:
                if stage.ramp != "constant" or not stage.target_sparsity:
                    problems.append(
                        f"stages[{i}]: from the first target_sparsity on every stage has one, and no ramp "
                        "(lambda goes where the target leads it)"
                    )
                continue
            if stage.l1 < before.l1 and stage.phase != "sft":
                problems.append(
                    f"stages[{i}].l1={stage.l1} is below stages[{i - 1}].l1={before.l1}: lambda never falls "
                    "(Algorithm 1), except in a stage with phase: sft"
                )
            if stage.ramp != "constant" and i == 1:
                problems.append(
                    f"stages[1].ramp={stage.ramp}: the warm-up stage is flat (Algorithm 1); use ramp: constant"
                )
            if stage.ramp == "exponential" and before.l1 == 0:
                problems.append(f"stages[{i}].ramp=exponential cannot start from lambda 0; use ramp: sine or linear")
            if stage.ramp == "constant" and i > 1 and stage.l1 != before.l1 and stage.phase != "sft":
                problems.append(
                    f"stages[{i}].ramp=constant jumps from lambda {before.l1} to {stage.l1}; "
                    "use ramp: sine, or the same l1 as the stage before"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return stages

    @model_validator(mode="after")
    def _shift(self) -> Train:
        if (self.activation == "shifted_relu") != (self.shift is not None):
            raise ValueError("activation: shifted_relu and shift go together")
        return self

    @model_validator(mode="after")
    def _rates(self) -> Train:
        """The learning rate of every stage is what its words say."""
        problems, first, has_decayed = [], 1, False
        for i, stage in enumerate(self.stages):
            place, steps, begins = f"stages[{i}]", stage.until_step - first + 1, first
            first = stage.until_step + 1
            if i == 0 and stage.warmup_steps:
                problems.append(f"{place}.warmup_steps={stage.warmup_steps}: the run's warm-up is train.warmup_steps")
            if stage.warmup_steps > steps:
                problems.append(f"{place}.warmup_steps={stage.warmup_steps} is more than the stage's {steps} steps")
            if stage.half_life and (self.schedule != "wsd" or stage.phase == "prosparse"):
                problems.append(
                    f"{place}.half_life={stage.half_life:g}: only with schedule: wsd does the rate fall, and only in a "
                    "stage with phase: decay or sft"
                )
            if stage.phase == "decay" and self.schedule == "constant":
                problems.append(f"{place}.phase=decay: with schedule: constant nothing falls; use schedule: wsd")
            if self.schedule != "wsd":
                continue
            if stage.phase == "decay" and not stage.half_life and not self.lr_min_ratio:
                problems.append(
                    f"{place}: an exponential fall does not reach lr_min_ratio=0; give one above 0, or half_life"
                )
            if stage.phase == "decay" and begins <= self.warmup_steps:
                problems.append(f"{place}: the rate falls before train.warmup_steps={self.warmup_steps} have passed")
            if has_decayed and stage.lr is None:
                problems.append(
                    f"{place}.lr is missing: after a stage with phase: decay the rate would leap back to train.lr="
                    f"{self.lr:g}"
                )
            has_decayed = has_decayed or stage.phase == "decay"
        if self.schedule == "wsd" and not has_decayed:
            problems.append("schedule: wsd needs a stage with phase: decay; without one, use schedule: constant")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rollback_reach(self) -> int:
        """Steps before a bad one that may be taken back."""
        return self.rollback_steps if self.rolls_back else 0

    @property
    def rolls_back(self) -> bool:
        return "rollback" in (self.on_non_finite, self.spike.action if self.spike else None)

    @property
    def total_steps(self) -> int:
        return self.stages[-1].until_step

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step
