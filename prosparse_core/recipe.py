"""The recipe: one YAML file with everything that decides a result, and a ``runtime`` section with all that does not.

Every error of a recipe is reported at once, each with its place, its value and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from prosparse_core.errors import BadInput
from prosparse_core.family import Family
from prosparse_core.recipe_compare import Compare as Compare
from prosparse_core.recipe_compare import Imported as Imported
from prosparse_core.recipe_compare import SettingName as SettingName
from prosparse_core.recipe_data import Data as Data
from prosparse_core.recipe_data import Source as Source
from prosparse_core.recipe_machine import Hardware, Shape
from prosparse_core.recipe_mixture import mixture_problems
from prosparse_core.recipe_runtime import Runtime as Runtime
from prosparse_core.recipe_runtime import check_world
from prosparse_core.recipe_speed import Speed as Speed
from prosparse_core.recipe_text import apply_override, explain
from prosparse_core.recipe_train import Section, Train

RECIPE_DIR = Path(__file__).resolve().parent.parent / "flows" / "recipes"
DEFAULT_THRESHOLDS = [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3]


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
    family: Family | None = None
    """Where its FFNs are, for an architecture that is of no known family; see :class:`prosparse_core.family.Family`."""
    trust_remote_code: bool = False
    """Run the code that comes with the checkpoint, for an architecture that transformers does not have."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision of every forward pass (weights stay fp32); ``auto`` is bf16 where the hardware has it."""


class Calibrate(Section):
    """Threshold shifting (paper, section 3.3): the FATReLU curve and the rule that picks from it."""

    rule: Literal["grid", "cett", "best"] = "grid"
    """grid: one threshold for all layers. cett: one per layer, all losing the same share of their output
    (CETT-PPL-p %, arXiv 2411.02335); the grid is then measured as well, to compare with and to fall back on.
    best: whichever of the two reaches more sparsity within the budget."""
    thresholds: list[float] = DEFAULT_THRESHOLDS
    max_ppl_increase_pct: float = Field(default=1.0, ge=0)
    refine: int = Field(default=4, ge=0, le=8)
    """How often the interval from the last threshold within the budget to the first one beyond it is narrowed."""

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
    benchmarks: list[str] = []
    """Further benchmarks: names of ours (``piqa``, ``gsm8k``), of a group (``commonsense``, ``paper``: all of the
    paper's) or of any lm-eval task."""
    datasets: str | None = None
    """A folder laid out like the hub (``DATASETS/owner/name/...``) to take their data from; None: the hub itself."""
    run_code: bool = False
    """Allow benchmarks that execute code the model wrote (HumanEval, MBPP), in a limited subprocess."""


class Predictor(Section):
    """Per-layer activation predictor d -> hidden -> d_ff, no bias, ReLU between (paper, App. F)."""

    hidden: int = Field(default=128, gt=0)
    input: Literal["post_norm", "pre_norm"] = "post_norm"
    """post_norm: what the FFN takes. pre_norm: the residual stream before the norm, which is what PowerInfer feeds."""
    init: Literal["random", "svd"] = "random"
    """svd: begin with the gate matrix (times the norm's weight, on pre_norm), cut to the rank the predictor has."""
    labels: Literal["nonzero", "top_p"] = "nonzero"
    """What it learns as active: every x1 that is not zero, or of these the ``top_share`` largest of each token."""
    top_share: float = Field(default=0.15, gt=0, le=1)
    """Of d_ff. Recall is also measured against these labels, whichever it learns."""
    negative_weight: float | Literal["density"] = "density"
    """Of an inactive neuron in the loss, where an active one weighs 1; density: the active share + 0.005."""
    train_tokens: int = Field(default=8192, gt=0)
    test_tokens: int = Field(default=4096, gt=0)
    epochs: int = Field(default=6, ge=0)
    """0, with init svd: the untrained low-rank gate."""
    batch_size: int = Field(default=128, gt=0)
    lr: float = Field(default=5e-3, gt=0)
    cutoffs: list[float] = [0.1, 0.25, 0.5, 0.75]
    target_recall: float | None = Field(default=None, gt=0, le=1)
    """Also choose the largest cutoff with this recall of ``labels`` on the calibration files, and measure it."""
    cutoff_scope: Literal["layer", "global"] = "layer"
    """Whether that cutoff is chosen for each layer or for all."""

    @field_validator("cutoffs")
    @classmethod
    def _inside(cls, cutoffs: list[float]) -> list[float]:
        if not cutoffs or any(not 0 < c < 1 for c in cutoffs):
            raise ValueError("cutoffs are probabilities strictly between 0 and 1")
        return cutoffs

    @field_validator("negative_weight")
    @classmethod
    def _positive(cls, weight: float | str) -> float | str:
        if isinstance(weight, float) and not 0 < weight < float("inf"):
            raise ValueError("a weight above 0, or density")
        return weight

    @model_validator(mode="after")
    def _taught(self) -> Predictor:
        if not self.epochs and self.init == "random":
            raise ValueError("epochs=0 leaves a random predictor: train it, or begin with init=svd")
        return self


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
    compare: Compare = Compare()
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
        check_world(self.runtime, step // seq)
        if problems := mixture_problems({s.name: s.weight for s in self.data.sources}, self.train.stages):
            raise ValueError("; ".join(problems))
        for i, source in enumerate(self.data.sources):
            shard = source.max_tokens // self.data.stream_shards
            if source.stream and (shard < seq or step > source.max_tokens - shard):
                raise ValueError(
                    f"data.sources[{i}].max_tokens={source.max_tokens} in data.stream_shards={self.data.stream_shards} "
                    f"shards: a shard must hold one window (data.seq_len={seq}), and all but one of them the "
                    f"{step} tokens of a step"
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
