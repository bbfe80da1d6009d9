"""What an architecture of no known family has that looks like an FFN, and the description that would make it known."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MAX_SHOWN = 6
HINT = (
    "describe its FFN in the recipe as model.family (or as prosparse_family in its config.json, or in Python by "
    "prosparse_core.families.register)"
)
DROPPED_OUT = ("Dropout", "Dropout1d", "Identity")


@dataclass(frozen=True)
class _Candidate:
    """A module of the first layer that holds a projection to d_ff and one back."""

    path: str
    matrices: Mapping[str, tuple[int, int]]
    """[outputs, inputs] of the projections among its children."""
    other: Mapping[str, str]
    """Its children without weights, or called so, by class: one of them is the activation."""


def describe(config: Any, model: nn.Module | None = None) -> tuple[str, str]:
    """(one line for each module that looks like an FFN, the hint to give); no lines where no model can be built."""
    candidates = _candidates(model if model is not None else _skeleton(config))
    lines = ""
    for one in candidates[:MAX_SHOWN]:
        parts = [f"{n} {list(shape)}" for n, shape in one.matrices.items()] + [f"{n} {c}" for n, c in one.other.items()]
        lines += f"\n  - {one.path}: {', '.join(parts)}"
    if len(candidates) > MAX_SHOWN:
        lines += f"\n  - and {len(candidates) - MAX_SHOWN} more"
    guess = next((g for g in map(_guess, candidates) if g), None)
    return lines, f"{HINT}, for example {guess or '{layers: ..., ffn: ..., gate: ..., up: ..., down: ..., act: ...}'}"


def _skeleton(config: Any) -> nn.Module | None:
    """The modules of a config's model without any weight; None where transformers has no code for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Whatever goes wrong here, the error that is about to be raised is the one to show.
    with contextlib.suppress(Exception), torch.device("meta"):
        if isinstance(config, Mapping):
            settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
            config = AutoConfig.for_model(config["model_type"], **settings)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return None


def _candidates(model: nn.Module | None) -> list[_Candidate]:
    found = []
    for path, module in [] if model is None else model.named_modules():
        if ".0" not in path:
            continue
        matrices = {n: shape for n, m in module.named_children() if (shape := _matrix(m))}
        if any(_goes_back(a, b) for a in matrices.values() for b in matrices.values()):
            other = {
                n: type(m).__name__
                for n, m in module.named_children()
                if (not list(m.parameters()) or "act" in n) and type(m).__name__ not in DROPPED_OUT
            }
            found.append(_Candidate(path, matrices, other))
    return found


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or list(module.children()):
        return None
    return tuple(weight.shape[::-1] if hasattr(module, "nf") else weight.shape)


def _goes_back(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """``b`` takes what ``a`` makes of x, or half of it, back to x's size; square ones belong to attention."""
    return a[0] != a[1] and b[0] == a[1] and b[1] in (a[0], a[0] / 2)


def _guess(one: _Candidate) -> str | None:
    """``{layers: model.layers, ffn: mlp, ...}`` for a recipe, where names and shapes leave no doubt."""
    layers, _, ffn = one.path.partition(".0")
    # Transposed shapes go back to each other: of the two, the one that is declared first comes first.
    pairs = combinations(one.matrices.items(), 2)
    downs = {name: before for (_, before), (name, shape) in pairs if _goes_back(before, shape)}
    if len(downs) != 1 or len(one.other) != 1:
        return None
    down, wide = next(iter(downs.items()))
    into = [n for n, shape in one.matrices.items() if shape == wide]
    gates = [n for n in into if "gate" in n]
    if len(into) == 1:
        parts = {"gate_up" if wide[0] == 2 * one.matrices[down][1] else "up": into[0]}
    elif len(into) == 2 and len(gates) == 1:
        parts = {"gate": gates[0], "up": next(n for n in into if n not in gates)}
    else:
        return None
    entry = {"layers": layers, "ffn": ffn.strip(".") or '""', **parts, "down": down, "act": next(iter(one.other))}
    return "{" + ", ".join(f"{k}: {v}" for k, v in entry.items()) + "}"
