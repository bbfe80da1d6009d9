"""The part of a recipe that says how speed is measured."""

from __future__ import annotations

from pydantic import Field, field_validator

from prosparse_core.recipe_train import Section


class Speed(Section):
    """How long the kernels are timed, and on what."""

    num_tokens: int = Field(default=32, gt=0)
    """Recorded inputs per layer."""
    threads: int = Field(default=1, gt=0)
    budget_s: float = Field(default=40.0, gt=0)
    """Seconds of timing. Reading a long prompt comes on top, and no prompt is read that alone would take as long."""
    decode_tokens: int = Field(default=48, gt=0)
    """Decoded after a prompt, at most."""
    decode_prompts: list[int] = Field(default=[32, 512, 2048], min_length=1)
    """Lengths of the prompts, in tokens, after which decoding is timed; the closing line shows the shortest. What the
    model has no positions for, the held-out text no tokens or the budget no time is n/a, with the reason."""
    raised_sparsity: float | None = Field(default=0.89, gt=0, lt=1)
    """Decoding is also timed with thresholds raised until this share of the gates is dead, the paper's sparsity; only
    to be compared with other engines: nothing else is measured with them. None: it is not."""

    @field_validator("decode_prompts")
    @classmethod
    def _lengths(cls, lengths: list[int]) -> list[int]:
        if any(n < 1 for n in lengths) or lengths != sorted(set(lengths)):
            raise ValueError("lengths of prompts are at least 1, each once, the shortest first")
        return lengths
