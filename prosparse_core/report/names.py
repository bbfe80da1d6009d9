"""What people call a setting, and what tells two rows of one setting apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prosparse_core.report.format import is_number, plain

SHIFTED = "_fatrelu"
"""Ends the name of what calibrated thresholds make of a setting; of prosparse_star they make prosparse."""
SHIFTED_ABOUT = "with FATReLU thresholds"
SETTINGS = {
    "original": ("Original", "dense activation"),
    "original_continued": ("Original, continued", "dense activation, trained on the same tokens"),
    "vanilla_relu": ("Vanilla ReLU", "ReLU, no regularization"),
    "shifted_relu": ("Shifted ReLU", "ReLU with a fixed shift"),
    "fixed_l1": ("Fixed L1", "constant lambda"),
    "prosparse_star": ("ProSparse*", "before threshold shifting"),
    "prosparse": ("ProSparse", SHIFTED_ABOUT),
    "linear_ramp": ("Linear ramp", "lambda rises along a line"),
    "exponential_ramp": ("Exponential ramp", "lambda rises exponentially"),
    "drelu": ("dReLU", "ReLU on gate and up"),
    "distilled": ("Distilled", "learns from the dense original"),
    "distilled_equal_time": ("Distilled, equal time", "fewer tokens, trained as long as the others"),
    "closed_loop": ("Closed loop", "lambda steered to a target sparsity"),
}
"""The rows of the paper's tables in their order, then others: what people call each, and what it is."""
EXPECTED = ("original", "vanilla_relu", "prosparse_star", "prosparse")
"""What every run of the main path measures."""
MAIN = ("prosparse", "prosparse_star", "fixed_l1", "shifted_relu", "vanilla_relu")
"""Whose training, in this order of preference, stands for a run."""


def name_of(setting: str) -> str:
    """What people call a setting; one they have no name for keeps its own."""
    before = setting.removesuffix(SHIFTED)
    if before in SETTINGS:
        return SETTINGS[before][0] + ("" if before == setting else ", thresholds")
    return setting


def order_of(setting: str) -> tuple[int, str]:
    """Sorts settings as the paper's tables do, each before what thresholds make of it; unknown ones last, by name."""
    known, before = list(SETTINGS), setting.removesuffix(SHIFTED)
    return (known.index(before) if before in known else len(known), setting)


def factor(l1: Any) -> str:
    """``λ 0.45``; empty where there is none."""
    return f"λ {plain(l1)}" if is_number(l1) else ""


def seed(value: Any) -> str:
    """``seed 43``; empty where there is none."""
    return "" if value is None else f"seed {value}"


def seeds(values: Sequence[Any]) -> str:
    """``42, 43``; empty for a model that was not trained."""
    return ", ".join(str(v) for v in values if v is not None)
