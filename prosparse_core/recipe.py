"""The recipe: one YAML file with everything that decides a result, and a ``runtime`` section with all that does not.

Every error of a recipe is reported at once, each with its place, its value and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prosparse_core.errors import BadInput
from prosparse_core.recipe_text import apply_override, explain

RECIPE_DIR = Path(__file__).resolve().parent.parent / "flows" / "recipes"
DEFAULT_THRESHOLDS = [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3]


class Section(BaseModel):
    """A closed, immutable part of a recipe: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Shape(Section):
    """Sizes of a gated decoder: lets ``plan`` estimate a model that is not here yet. Decides no result."""

    num_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    tied: bool = False


class Hardware(Section):
    """What ``plan`` estimates hours for. Decides no result."""

    device: Literal["a100-80g", "h100-80g", "cpu-core"]
    count: int = Field(gt=0)


class Model(Section):
    """Where the dense model comes from."""

    id: str
    """The name of the model in the ledger and in tables."""
    source: str
    """A hub id, a folder, a ``.gguf`` file, ``package:NAME`` (a GGUF in an installed package) or ``random:FAMILY``."""
    revision: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """Only for ``random:FAMILY``: the keys of the Hugging Face config."""
    shape: Shape | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision of every forward pass (weights stay fp32); ``auto`` is bf16 where the hardware has it."""


class Source(Section):
    """One corpus of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["python-code", "package-docs", "code-instructions", "hub", "files"]
    weight: float = Field(ge=0)
    max_tokens: int = Field(default=400_000, gt=0)
    """At most this many training tokens are prepared; a longer run goes over them again, which the manifest says."""
    path: str | None = None
    """hub: the dataset id; files: a file, a folder or a glob of parquet, jsonl or text files."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    """The column that holds the text, when no template is given."""
    template: str | None = None
    """Text from several columns: ``"{question}\\n{answer}"``."""
    prompt: str | None = None
    answer: str | None = None
    """Templates of an instruction corpus: chat format, loss on the answer only."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        if self.kind in ("hub", "files") and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path")
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together")
        if self.prompt is not None and self.template is not None:
            raise ValueError("give either a template or prompt and answer")
        return self


class Data(Section):
    """The mixture: corpora with weights, packed to a fixed length; held-out files per corpus."""

    seq_len: int = Field(gt=1)
    sources: list[Source] = Field(min_length=1)
    calibration_tokens: int = Field(default=8192, gt=0)
    """Held-out tokens per corpus on which thresholds are chosen."""
    evaluation_tokens: int = Field(default=8192, gt=0)
    """Held-out tokens per corpus on which everything is reported; other files than calibration's."""
    choice_questions: int = Field(default=60, ge=0)
    """Multiple-choice questions (docstring -> function body) made of held-out code."""

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: list[Source]) -> list[Source]:
        names = [s.name for s in sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two sources have the same name: {', '.join(twice)}")
        for reserved in {"mixed", "choices"} & set(names):
            raise ValueError(f"a source cannot be named {reserved!r}: that name is taken in files and tables")
        if sum(s.weight for s in sources) <= 0:
            raise ValueError("the weights of all sources are 0")
        return sources


class L1Reduction(Section):
    """How |x1| becomes one number. The paper does not say; the default is sum over layers of the mean over elements."""

    tokens: Literal["mean"] = "mean"
    d_ff: Literal["mean", "sum"] = "mean"
    layers: Literal["sum", "mean"] = "sum"


class Stage(Section):
    """One regularization stage: ``l1`` is lambda at its end; ``until_step`` is accumulated (paper, Table 6)."""

    until_step: int = Field(gt=0)
    l1: float = Field(ge=0)
    ramp: Literal["constant", "sine"] = "constant"
    phase: Literal["prosparse", "decay", "sft"] = "prosparse"


class Train(Section):
    """Continual training with progressive sparsity regularization (paper, section 3 and Algorithm 1)."""

    tokens_per_step: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    """Sequences per forward pass; default: the whole step."""
    lr: float = Field(gt=0)
    lr_min_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    l1_reduction: L1Reduction = L1Reduction()
    freeze: list[Literal["embeddings"]] = []
    """Weights that stay as they are. The paper trains all; with few tokens AdamW's normalised steps move the rows of
    rare tokens, in the embeddings and the output head, by noise alone."""
    stages: list[Stage] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _ordered(cls, stages: list[Stage]) -> list[Stage]:
        problems = []
        if stages[0].l1 != 0:
            problems.append(f"stages[0].l1={stages[0].l1}: stage 0 only substitutes the activation, its lambda is 0")
        for i, (before, stage) in enumerate(pairwise(stages), start=1):
            if stage.until_step <= before.until_step:
                problems.append(
                    f"stages[{i}].until_step={stage.until_step} must exceed stages[{i - 1}].until_step="
                    f"{before.until_step} (steps are accumulated, not per stage)"
                )
            if stage.l1 < before.l1 and stage.phase != "sft":
                problems.append(
                    f"stages[{i}].l1={stage.l1} is below stages[{i - 1}].l1={before.l1}: lambda never falls "
                    "(Algorithm 1), except in a stage with phase: sft"
                )
            if stage.ramp == "sine" and i == 1:
                problems.append("stages[1].ramp=sine: the warm-up stage is flat (Algorithm 1); use ramp: constant")
            if stage.ramp == "constant" and i > 1 and stage.l1 != before.l1 and stage.phase != "sft":
                problems.append(
                    f"stages[{i}].ramp=constant jumps from lambda {before.l1} to {stage.l1}; "
                    "use ramp: sine, or the same l1 as the stage before"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return stages

    @property
    def total_steps(self) -> int:
        return self.stages[-1].until_step

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    def tokens_after(self, stage: int) -> int:
        """Tokens seen when a stage ends."""
        return self.stages[stage].until_step * self.tokens_per_step


class Calibrate(Section):
    """Threshold shifting (paper, section 3.3): the FATReLU curve and the rule that picks from it."""

    thresholds: list[float] = DEFAULT_THRESHOLDS
    max_ppl_increase_pct: float = Field(default=1.0, ge=0)
    refine: int = Field(default=4, ge=0, le=8)
    """Bisection steps between the last threshold within the budget and the first one beyond it."""

    @field_validator("thresholds")
    @classmethod
    def _grid(cls, thresholds: list[float]) -> list[float]:
        if thresholds != sorted(set(thresholds)) or not thresholds or thresholds[0] != 0:
            raise ValueError("must rise from 0 without repeats: the curve is measured against threshold 0")
        return thresholds


class Evaluate(Section):
    """What lm-eval measures of every variant."""

    batch_size: int = Field(default=4, gt=0)
    limit: int | None = Field(default=None, gt=0)
    """At most this many documents per task; marks the rows as partial."""
    choice: bool = True


class Predictor(Section):
    """Per-layer activation predictor d -> hidden -> d_ff, no bias, ReLU between (paper, App. F)."""

    hidden: int = Field(default=128, gt=0)
    train_tokens: int = Field(default=8192, gt=0)
    test_tokens: int = Field(default=4096, gt=0)
    epochs: int = Field(default=6, gt=0)
    batch_size: int = Field(default=128, gt=0)
    lr: float = Field(default=5e-3, gt=0)
    cutoffs: list[float] = [0.1, 0.25, 0.5, 0.75]

    @field_validator("cutoffs")
    @classmethod
    def _inside(cls, cutoffs: list[float]) -> list[float]:
        if not cutoffs or any(not 0 < c < 1 for c in cutoffs):
            raise ValueError("cutoffs are probabilities strictly between 0 and 1")
        return cutoffs


class Speed(Section):
    """How long the kernels are timed, and on what."""

    num_tokens: int = Field(default=32, gt=0)
    """Recorded inputs per layer."""
    threads: int = Field(default=1, gt=0)
    budget_s: float = Field(default=40.0, gt=0)
    decode_tokens: int = Field(default=48, gt=0)


class Runtime(Section):
    """Where and how it runs: outside the identity of every result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    checkpoint_every_minutes: float = Field(default=5.0, gt=0)


class Recipe(Section):
    """One reproducible path from a dense model to a measured sparse one."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    seed: int = 42
    model: Model
    data: Data
    train: Train
    calibrate: Calibrate = Calibrate()
    evaluate: Evaluate = Evaluate()
    predictor: Predictor = Predictor()
    speed: Speed = Speed()
    hardware: Hardware | None = None
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        step, seq = self.train.tokens_per_step, self.data.seq_len
        if step % seq:
            raise ValueError(f"train.tokens_per_step={step} must be a multiple of data.seq_len={seq}")
        micro = self.train.micro_batch
        if micro and (step // seq) % micro:
            raise ValueError(
                f"train.micro_batch={micro} must divide the {step // seq} sequences of a step (train.tokens_per_step)"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def names() -> list[str]:
    """The recipes that come with the product."""
    return sorted(p.stem for p in RECIPE_DIR.glob("*.yaml"))


def find(recipe: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        BadInput: no such recipe; the hint names the nearest ones.
    """
    shipped = RECIPE_DIR / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    near = difflib.get_close_matches(recipe, names(), n=3, cutoff=0.4) or names()
    raise BadInput(
        f"unknown recipe {recipe!r}", hint=f"did you mean {', '.join(near)}? Or give the path of a .yaml file"
    )


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (``a.b=c``, ``train.stages.1.l1=0.1``) and validate a recipe.

    Raises:
        BadInput: with every problem of the recipe at once.
    """
    path = find(recipe)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: a recipe is a mapping, this is {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    return parse(raw, where=str(path))


def parse(raw: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate an already read recipe; see :func:`load`."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [explain(e, Recipe) for e in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise BadInput(f"{where}: {count}\n" + "\n".join(f"  - {line}" for line in lines)) from None
