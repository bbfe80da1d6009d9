"""Where gate, up, down and the activation live in each architecture: one entry a family.

Shapes: gate and up are ``nn.Linear(d_model, d_ff)``, down is ``nn.Linear(d_ff, d_model)``.
x1 = act(gate(x)) * up(x) is the input of down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput

if TYPE_CHECKING:
    from torch import nn


EXPORTED = "prosparse_"
"""What an exported model's ``model_type`` has before the name of its architecture, whose layout it keeps."""


@dataclass(frozen=True)
class Family:
    """One FFN layout, shared by one or more architectures (``config.model_type``)."""

    name: str
    model_types: tuple[str, ...]
    layers: str
    """Dotted path from the model to the list of its layers."""
    ffn: str
    """Dotted path from a layer to its FFN."""
    gate: str
    up: str
    down: str
    act: str
    config_key: str
    """The key of the Hugging Face config that names the activation."""


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "gemma"),
    layers="model.layers",
    ffn="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    act="act_fn",
    config_key="hidden_act",
)
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="gemma2", model_types=("gemma2",), config_key="hidden_activation"),
)


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer of a concrete model. ``module.<family.act>`` holds its activation."""

    layer: int
    module: nn.Module
    family: Family

    @property
    def gate(self) -> nn.Linear:
        return self.module.get_submodule(self.family.gate)  # type: ignore[return-value]

    @property
    def up(self) -> nn.Linear:
        return self.module.get_submodule(self.family.up)  # type: ignore[return-value]

    @property
    def down(self) -> nn.Linear:
        return self.module.get_submodule(self.family.down)  # type: ignore[return-value]

    @property
    def activation(self) -> nn.Module:
        return self.module.get_submodule(self.family.act)

    def swap_activation(self, activation: nn.Module) -> None:
        """Give this FFN, and no other, a new activation."""
        setattr(self.module, self.family.act, activation)


def family_of(model_type: str) -> Family | None:
    """The family of an architecture, or None when no entry names it; an exported model has that of its architecture."""
    return next((f for f in FAMILIES if model_type.removeprefix(EXPORTED) in f.model_types), None)


def require_family(model_type: str, *, where: str, model: nn.Module | None = None) -> Family:
    """The family of an architecture.

    Raises:
        BadInput: unknown family; names the modules that look like an FFN and how to register them.
    """
    family = family_of(model_type)
    if family is not None:
        return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    looks = "" if model is None else "".join(f"\n  - {line}" for line in _lookalikes(model))
    raise BadInput(
        f"{where}: architecture {model_type!r} is of no known FFN family (known: {known})"
        + (f"; these modules look like an FFN:{looks}" if looks else ""),
        hint="add a Family entry for it to prosparse_core/families.py",
    )


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of every layer, in order.

    Raises:
        BadInput: unknown family, or a layer without the parts its family has.
    """
    model_type = model.config.model_type  # type: ignore[union-attr]
    family = require_family(model_type, where=type(model).__name__, model=model)  # type: ignore[arg-type]
    ffns = []
    layers: Any = model.get_submodule(family.layers)
    for index, layer in enumerate(layers):
        try:
            ffn = FFN(index, layer.get_submodule(family.ffn), family)
            _ = (ffn.gate, ffn.up, ffn.down, ffn.activation)
        except AttributeError as error:
            name = type(model).__name__
            raise BadInput(f"layer {index} of {name} lacks a part of family {family.name}: {error}") from None
        ffns.append(ffn)
    if not ffns:
        raise BadInput(f"{type(model).__name__} has no layers at {family.layers}")
    return ffns


def _lookalikes(model: nn.Module) -> Iterator[str]:
    """Modules that hold a projection up and one back down: what a new Family entry would name."""
    for name, module in model.named_modules():
        linears = {n: m for n, m in module.named_children() if hasattr(m, "weight") and m.weight.ndim == 2}
        shapes = {tuple(m.weight.shape) for m in linears.values()}
        if any((b, a) in shapes and a != b for a, b in shapes) and ".0" in name:
            yield f"{name}: " + ", ".join(f"{n} {list(m.weight.shape)}" for n, m in linears.items())
