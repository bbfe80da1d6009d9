"""Where gate, up, down and the activation live in each architecture: one entry a family.

An architecture that is not here is described in the recipe (``model.family``), in the model's own config.json (under
``prosparse_family``, where a recipe's description ends up too, so that it travels with the weights), or, for Python, by
:func:`register`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from prosparse_core.errors import BadInput
from prosparse_core.family import FFN as FFN
from prosparse_core.family import Family as Family
from prosparse_core.family import value_of
from prosparse_core.recipe_text import explain

if TYPE_CHECKING:
    from torch import nn


EXPORTED = "prosparse_"
"""What an exported model's ``model_type`` has before the name of its architecture, whose layout it keeps."""
FAMILY_KEY = "prosparse_family"
"""Where a config.json describes its own family; before any entry here."""


def _like(family: Family, **changes: Any) -> Family:
    return Family(**{**family.model_dump(), **changes})


LLAMA = Family(
    name="llama",
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "granite",
        "gemma",
        "olmo",
        "smollm3",
        "helium",
        "seed_oss",
        "ministral",
        "ernie4_5",
        "hunyuan_v1_dense",
    ),
    layers="model.layers",
    ffn="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    act="act_fn",
    norm=("post_attention_layernorm",),
)
NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    ffn="mlp",
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    act="act",
    norm=("post_attention_layernorm",),
)
GPT2 = Family(
    name="gpt2",
    model_types=("gpt2", "gpt_bigcode"),
    layers="transformer.h",
    ffn="mlp",
    up="c_fc",
    down="c_proj",
    act="act",
    config_key="activation_function",
    norm=("ln_2",),
    num_layers_key="n_layer",
    d_model_key="n_embd",
    d_ff_key="n_inner",
)
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    # LLaMA's FFN with other norms, and GELU under another key.
    _like(LLAMA, name="olmo2", model_types=("olmo2", "olmo3", "exaone4"), norm=()),
    _like(LLAMA, name="cohere", model_types=("cohere", "cohere2"), norm=("input_layernorm",)),
    _like(LLAMA, name="stablelm", model_types=("stablelm",), norm=("post_attention_layernorm", "input_layernorm")),
    _like(
        LLAMA,
        name="gemma2",
        model_types=("gemma2", "gemma3_text"),
        config_key="hidden_activation",
        norm=("pre_feedforward_layernorm",),
    ),
    # Its code comes with the checkpoint; sliced (tensor-parallel) projections are not called as modules.
    _like(LLAMA, name="minicpm", model_types=("minicpm",), needs={"pretraining_tp": 1}),
    Family(
        name="phi3",
        model_types=("phi3", "glm", "glm4"),
        layers="model.layers",
        ffn="mlp",
        gate_up="gate_up_proj",
        down="down_proj",
        act="activation_fn",
        norm=("post_attention_layernorm",),
    ),
    # Ungated from here on.
    NEOX,
    GPT2,
    _like(
        GPT2,
        name="gpt_neo",
        model_types=("gpt_neo",),
        num_layers_key="num_layers",
        d_model_key="hidden_size",
        d_ff_key="intermediate_size",
    ),
    _like(GPT2, name="gptj", model_types=("gptj",), up="fc_in", down="fc_out", norm=("ln_1",)),
    Family(
        name="opt",
        model_types=("opt",),
        layers="model.decoder.layers",
        ffn="",
        up="fc1",
        down="fc2",
        act="activation_fn",
        config_key="activation_function",
        norm=("final_layer_norm",),
        norm_if="do_layer_norm_before",
        d_ff_key="ffn_dim",
        documents="mask",
    ),
    _like(NEOX, name="persimmon", model_types=("persimmon",), layers="model.layers"),
    _like(
        NEOX,
        name="bloom",
        model_types=("bloom",),
        layers="transformer.h",
        act="gelu_impl",
        act_is_built_in=True,
        num_layers_key="n_layer",
        d_ff_key=None,
        documents="none",
        needs={"slow_but_exact": False},
    ),
    _like(
        NEOX,
        name="falcon",
        model_types=("falcon",),
        layers="transformer.h",
        config_key="activation",
        norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        d_ff_key="ffn_hidden_size",
        documents="mask",
    ),
    Family(
        name="phi",
        model_types=("phi",),
        layers="model.layers",
        ffn="mlp",
        up="fc1",
        down="fc2",
        act="activation_fn",
        norm=("input_layernorm",),
    ),
    Family(
        name="starcoder2",
        model_types=("starcoder2",),
        layers="model.layers",
        ffn="mlp",
        up="c_fc",
        down="c_proj",
        act="act",
        norm=("post_attention_layernorm",),
    ),
    Family(
        name="nemotron",
        model_types=("nemotron", "arcee"),
        layers="model.layers",
        ffn="mlp",
        up="up_proj",
        down="down_proj",
        act="act_fn",
        norm=("post_attention_layernorm",),
    ),
)
_registered: list[Family] = []


def register(family: Family) -> None:
    """Make a family known in this process, before all others; a recipe says ``model.family`` instead.

    Raises:
        BadInput: it names no architecture.
    """
    if not family.model_types:
        raise BadInput(f"family {family.name} has no model_types: which architectures is it for?")
    _registered.insert(0, family)


def family_of(config: Any) -> Family | None:
    """The family of a config (a mapping or an object), or None when no entry names its ``model_type``.

    An exported model has the family of its architecture; a config that describes its own family has that.

    Raises:
        BadInput: that description is none.
    """
    described = value_of(config, FAMILY_KEY)
    if described is not None:
        return _described(described)
    model_type = str(value_of(config, "model_type")).removeprefix(EXPORTED)
    return next((f for f in (*_registered, *FAMILIES) if model_type in f.model_types), None)


def _described(raw: Any) -> Family:
    try:
        return Family.model_validate(raw)
    except ValidationError as error:
        lines = "; ".join(explain(e, Family) for e in error.errors())
        raise BadInput(f"{FAMILY_KEY} in config.json: {lines}") from None


def require_family(config: Any, *, where: str, model: nn.Module | None = None) -> Family:
    """The family of a config.

    Args:
        model: the model itself, where there is one; else its modules are built without weights to look at them.

    Raises:
        BadInput: unknown family (names the modules that look like an FFN and how to describe them), or a config under
            which the family's modules are not what computes the FFN.
    """
    family = family_of(config)
    if family is None:
        from prosparse_core.lookalikes import describe

        known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
        found, hint = describe(config, model)
        raise BadInput(
            f"{where}: architecture {value_of(config, 'model_type')!r} is of no known FFN family (known: {known})"
            + (f"; these modules look like an FFN:{found}" if found else ""),
            hint=hint,
        )
    for key, value in family.needs.items():
        found = value_of(config, key)
        if found is not None and found != value:
            raise BadInput(
                f"{where}: {key} is {found!r}: then an FFN of family {family.name} is not computed by its own modules",
                hint=f"set {key} to {value!r} in config.json: the weights are the same",
            )
    return family


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of every layer, in order.

    Raises:
        BadInput: unknown family, or a layer without the parts its family has.
    """
    name = type(model).__name__
    family = require_family(model.config, where=name, model=model)
    ffns = []
    try:
        layers: Any = model.get_submodule(family.layers)
    except AttributeError as error:
        raise BadInput(f"{name} lacks the layers of family {family.name}: {error}") from None
    for index, layer in enumerate(layers):
        try:
            ffn = FFN(index, layer.get_submodule(family.ffn), family)
            _ = (ffn.first, ffn.up_weight, ffn.down_weight, ffn.activation)
        except AttributeError as error:
            raise BadInput(f"layer {index} of {name} lacks a part of family {family.name}: {error}") from None
        if ffn.up_weight.shape != ffn.down_weight.shape[::-1] or ffn.act_weight.shape != ffn.up_weight.shape:
            raise BadInput(
                f"layer {index} of {name} does not fit family {family.name}: what goes in is "
                f"{list(ffn.act_weight.shape)} and {list(ffn.up_weight.shape)}, down is {list(ffn.down_weight.shape)}"
            )
        ffns.append(ffn)
    if not ffns:
        raise BadInput(f"{name} has no layers at {family.layers}")
    return ffns
