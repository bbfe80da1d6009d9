"""Documents of one packed window that do not attend to each other: what a forward pass needs for that.

``positions`` [B, T] count from 0 in each document (or part of one) of a window; None: all of a window is one text. From
positions that begin anew most architectures of transformers build the block-diagonal mask themselves, also where a
layer's window slides; the others take the mask itself, or cannot keep documents apart (see ``Family.documents``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.families import FAMILIES, require_family
from prosparse_core.family import APART, Family, value_of, way_of

NOISE = 0.1
"""Of what documents do to each other in a window: what may be left of it, since kernels round differently."""


class Packed(NamedTuple):
    """Windows, and where in its document each token stands."""

    tokens: Tensor
    """int64 [windows, length]"""
    positions: Tensor | None = None
    """Likewise; None: a window is one text."""

    @classmethod
    def of(cls, windows: Tensor | Packed) -> Packed:
        return windows if isinstance(windows, Packed) else cls(windows)


def forward_arguments(model: nn.Module, positions: Tensor | None) -> dict[str, Tensor]:
    """What ``model(input_ids=tokens, ...)`` takes besides, on the model's device.

    Raises:
        BadInput: see :func:`way_of`.
    """
    if positions is None:
        return {}
    config: Any = model.config
    found = {"position_ids": positions.to(next(model.parameters()).device)}
    if way_of(config, require_family(config, where=type(model).__name__)) == "mask":
        found["attention_mask"] = block_mask(found["position_ids"])
    return found


def block_mask(positions: Tensor) -> Tensor:
    """[B, 1, T, T]: 0 where a token (row) may look, the least float32 elsewhere: behind it, and in other documents."""
    document = (positions == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    allowed = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=positions.device).tril()
    return torch.zeros(same.shape, device=positions.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def positions_of(begins: Tensor) -> Tensor:
    """int64 positions of ``begins`` bool [..., T]: where a document begins; the first place does in any case."""
    at = torch.arange(begins.shape[-1], device=begins.device)
    return at - torch.where(begins, at, 0).cummax(-1).values


def is_proven(config: Any, family: Family) -> bool:
    """Whether the tests show of this architecture that documents stay apart; not for one a recipe describes."""
    return family in FAMILIES and value_of(config, "model_type") in family.model_types


@torch.no_grad()
def require_apart(model: nn.Module) -> None:
    """Try it: two short documents in one window give the logits that each gives alone. Every rank must call.

    Raises:
        BadInput: they do not.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    vocab = int(value_of(config, "vocab_size") or 256)
    tokens = torch.arange(24, device=device)[None] * 7919 % vocab
    begins = torch.zeros(1, 24, dtype=torch.bool, device=device)
    begins[0, 11] = True

    def logits(part: Tensor, **more: Tensor) -> Tensor:
        found: Tensor = model(input_ids=part, use_cache=False, **more).logits
        return found.float()

    was_training = model.training
    model.eval()
    alone = logits(tokens[:, 11:])
    together = logits(tokens, **forward_arguments(model, positions_of(begins)))[:, 11:]
    mixed = logits(tokens)[:, 11:]
    model.train(was_training)
    if float((together - alone).abs().max()) > NOISE * float((mixed - alone).abs().max()) + 1e-6:
        raise BadInput(
            f"{type(model).__name__}: positions that begin anew do not keep the documents of a packed window "
            "apart: the second of two has other logits than alone",
            hint=f"set {APART}: true, or, if its code takes a mask [B, 1, T, T], model.family.documents: mask",
        )
