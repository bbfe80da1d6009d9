"""The shape of a model that only its recipe describes."""

from __future__ import annotations

import pytest

from prosparse_core.family import Family
from prosparse_core.planning.shapes import shape_of
from prosparse_core.recipe import Model

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 20,
    "vocab_size": 32,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(("source", "gated"), [("llama", True), ("phi3", True), ("opt", False), ("unheard-of", True)])
def test_the_shape_of_a_random_model_has_its_familys_gate(source: str, gated: bool) -> None:
    shape = shape_of(Model(id="m", source=f"random:{source}", config=SIZES))
    assert shape is not None
    assert shape.gated is gated


def test_a_family_that_the_recipe_describes_decides() -> None:
    family = Family(layers="model.layers", ffn="mlp", up="wi", down="wo", act="act")
    model = Model(id="m", source="random:new", config=SIZES, family=family)
    shape = shape_of(model)
    assert shape is not None
    assert shape.gated is False
