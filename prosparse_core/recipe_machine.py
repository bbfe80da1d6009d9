"""The parts of a recipe that only ``plan`` reads: the sizes of a model that is not here yet, and a machine for it."""

from __future__ import annotations

from pydantic import Field, field_validator

from prosparse_core.errors import BadInput
from prosparse_core.planning.hardware import find_device
from prosparse_core.recipe_train import Section


class Shape(Section):
    """Sizes of a decoder: lets ``plan`` estimate a model that is not here yet. Decides no result."""

    num_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    """Default: ``d_model / num_heads``."""
    tied: bool = False
    gated: bool = True
    """False: an FFN of two matrices, whose activation alone makes x1 (GPT-2, OPT, Falcon)."""

    @property
    def q_dim(self) -> int:
        return self.num_heads * (self.head_dim or self.d_model // self.num_heads)

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * (self.head_dim or self.d_model // self.num_heads)


class Hardware(Section):
    """What ``plan`` estimates memory and hours for, unless its options say otherwise. Decides no result."""

    device: str
    """A name of :mod:`prosparse_core.planning.hardware`, such as a100-80g, or cpu-core."""
    count: int = Field(gt=0)
    """Devices in all: GPUs, each with a process of its own, or cores. ``runtime.processes``, if given, counts instead
    of the former."""

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        try:
            return find_device(device).name
        except BadInput as error:
            raise ValueError(f"unknown device; {error.hint}") from None
