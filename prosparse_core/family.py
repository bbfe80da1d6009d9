"""One FFN layout, and the FFN of one layer in it: the only place that knows what a projection looks like inside.

Three layouts: gated, with gate and up apart; gated, with both as one matrix (``gate_up``: first the gate's rows, then
up's); ungated, with ``up`` alone. x1 is always the input of down, [..., d_ff]:

- gated: x1 = act(gate(x)) * up(x) (paper, eq. 2);
- ungated: x1 = act(up(x)), the paper's x1 with its up == 1: the one projection is what the activation sees, as gate is.

So the threshold of FATReLU is always one on what the activation sees, and a neuron is active where x1 is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from prosparse_core.errors import BadInput
from prosparse_core.recipe_train import Section

APART = "data.attend_across_documents"
"""The option that lets the documents of a window attend to each other."""

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """What a config says of a model's FFNs."""

    num_layers: int
    d_model: int
    d_ff: int


class Family(Section):
    """One FFN layout, shared by one or more architectures (``config.model_type``)."""

    name: str = "custom"
    model_types: tuple[str, ...] = ()
    layers: str
    """Dotted path from the model to the list of its layers."""
    ffn: str
    """Dotted path from a layer to its FFN; empty where the layer holds the projections itself."""
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    """gate and up as one projection with 2 d_ff outputs, the gate's first."""
    down: str
    act: str
    """The module that is called on gate(x), or on up(x) without a gate."""
    config_key: str = "hidden_act"
    """The key of the Hugging Face config that names the activation."""
    act_is_built_in: bool = False
    """The architecture's code has its activation fixed and reads no key: what ``config_key`` says then is for us, and a
    plain reload runs the original activation whatever it says."""
    norm: tuple[str, ...] = ()
    """Path from a layer to the norm whose output the FFN takes; of several the first that is there; empty: there is
    none, the FFN takes the residual stream itself."""
    norm_if: str | None = None
    """A key of the config that must be true for that norm to come before the FFN, not behind it."""
    num_layers_key: str = "num_hidden_layers"
    d_model_key: str = "hidden_size"
    d_ff_key: str | None = "intermediate_size"
    """Where the config has d_ff; missing or null there: 4 d_model."""
    documents: Literal["positions", "mask", "none"] = "positions"
    """How the documents of a packed window are kept apart: by positions that begin anew, from which the model makes its
    mask; by a mask [B, 1, T, T] besides; or not at all (see :mod:`prosparse_core.document_masks`)."""
    needs: dict[str, bool | int | str] = Field(default_factory=dict)
    """Values of the config without which the layout is another one, such as a sliced down that is never called."""

    @model_validator(mode="after")
    def _one_layout(self) -> Family:
        given = [n for n in ("gate", "up", "gate_up") if getattr(self, n) is not None]
        if given not in (["gate", "up"], ["gate_up"], ["up"]):
            raise ValueError(f"a family has gate and up, or gate_up, or up alone; given: {', '.join(given) or 'none'}")
        return self

    @property
    def is_gated(self) -> bool:
        return self.gate is not None or self.gate_up is not None

    def sizes(self, config: Any) -> Sizes:
        """The sizes in a config, a mapping or an object; the common names serve where the family's own are missing.

        Raises:
            BadInput: the config has one under neither name.
        """

        d_model = self._size(config, "d_model_key", "hidden_size")
        d_ff = None if self.d_ff_key is None else value_of(config, self.d_ff_key)
        return Sizes(self.num_layers(config), d_model, 4 * d_model if d_ff is None else int(d_ff))

    def num_layers(self, config: Any) -> int:
        """See :meth:`sizes`."""
        return self._size(config, "num_layers_key", "num_hidden_layers")

    def _size(self, config: Any, field: str, common: str) -> int:
        found = [value_of(config, key) for key in (getattr(self, field), common)]
        sizes = [size for size in found if size is not None]
        if not sizes:
            raise BadInput(
                f"the config has no {getattr(self, field)}, where family {self.name} looks for a size",
                hint=f"say its name with {field} in the description of the family",
            )
        return int(sizes[0])

    def named(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a config with ``intermediate_size`` under this family's name for d_ff; the other sizes have
        common names in transformers. Where d_ff is none of the config's it is left out."""
        d_ff = settings.get("intermediate_size")
        if d_ff is None or self.d_ff_key == "intermediate_size":
            return dict(settings)
        rest = {k: v for k, v in settings.items() if k != "intermediate_size"}
        return {self.d_ff_key: d_ff, **rest} if self.d_ff_key else rest

    def activation_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Every key of a config that names the FFN's activation, ``hidden_act`` (the published one) among them."""
        return sorted({"hidden_act", self.config_key} | ({"hidden_activation"} & config.keys()))


def value_of(config: Any, key: str) -> Any:
    """A key of a config, be it a mapping or an object; None where it is missing."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer of a concrete model.

    Weights are views in ``nn.Linear``'s orientation, [outputs, inputs], whatever the module keeps: a change of one is a
    change of the model. Hooks belong on :attr:`first` (its input is x), :attr:`activation` (its input is gate(x), or
    up(x) without a gate) and :attr:`down` (its input is x1).
    """

    layer: int
    module: nn.Module
    family: Family

    @property
    def first(self) -> nn.Module:
        """The projection that takes x before any other does."""
        name = self.family.gate or self.family.gate_up or self.family.up
        assert name is not None
        return self.module.get_submodule(name)

    @property
    def down(self) -> nn.Module:
        return self.module.get_submodule(self.family.down)

    @property
    def activation(self) -> nn.Module:
        return self.module.get_submodule(self.family.act)

    @property
    def d_model(self) -> int:
        return self.down_weight.shape[0]

    @property
    def d_ff(self) -> int:
        return self.down_weight.shape[1]

    @property
    def gate_weight(self) -> Tensor | None:
        """[d_ff, d_model]; None without a gate."""
        if self.family.gate_up is not None:
            return _weight(self.first)[: self.d_ff]
        return _weight(self.first) if self.family.gate is not None else None

    @property
    def up_weight(self) -> Tensor:
        """[d_ff, d_model]."""
        if self.family.gate_up is not None:
            return _weight(self.first)[self.d_ff :]
        assert self.family.up is not None
        return _weight(self.module.get_submodule(self.family.up))

    @property
    def act_weight(self) -> Tensor:
        """[d_ff, d_model]: what the activation sees is this times x (and a bias): the gate, or up without a gate."""
        gate = self.gate_weight
        return self.up_weight if gate is None else gate

    @property
    def down_weight(self) -> Tensor:
        """[d_model, d_ff]."""
        return _weight(self.down)

    def projections(self) -> list[tuple[str, nn.Module]]:
        """Every projection with its role."""
        names = ((role, getattr(self.family, role)) for role in ("gate", "up", "gate_up", "down"))
        return [(role, self.module.get_submodule(name)) for role, name in names if name is not None]

    @property
    def biases(self) -> list[str]:
        """The projections with a bias, by their role."""
        return [role for role, projection in self.projections() if getattr(projection, "bias", None) is not None]

    def swap_activation(self, activation: nn.Module) -> None:
        """Give this FFN, and no other, a new activation."""
        path, _, name = self.family.act.rpartition(".")
        setattr(self.module.get_submodule(path), name, activation)


def _weight(projection: nn.Module) -> Tensor:
    """A projection's weight as [outputs, inputs]; transformers' Conv1D (GPT-2) keeps it the other way round."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.t() if hasattr(projection, "nf") else weight


def way_of(config: Any, family: Family) -> Literal["positions", "mask"]:
    """How the documents of a window are kept apart in an architecture.

    Raises:
        BadInput: it cannot be done: its attention is biased by distances (ALiBi), for which it takes no such mask.
    """
    if family.documents == "none" or value_of(config, "alibi"):
        raise BadInput(
            f"{value_of(config, 'model_type')}: its attention (ALiBi) has no way to keep the documents of a packed "
            "window apart",
            hint=f"set {APART}: true: then each document also sees those before it in its window",
        )
    return family.documents
