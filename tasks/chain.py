"""What the steps after base_model ask of an architecture, told by its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prosparse_core.families import require_family
from prosparse_core.recipe import Recipe


def require_chain(recipe: Recipe, config: Mapping[str, Any], activations: Sequence[str]) -> None:
    """Refuse an architecture that the recipe's steps cannot be run on.

    Args:
        activations: what is going to be put into the model.

    Raises:
        BadInput: dReLU without a gate, or predictors on the input before a norm that is not there.
    """
    if recipe.predictor.input == "pre_norm":
        from prosparse_core.prediction.input import require_norm

        require_norm(config, require_family(config, where="model"))
    if "drelu" in activations:
        from prosparse_core.substitute import require_up

        require_up(require_family(config, where="model"), "drelu")
