"""Held-out perplexity and sparsity while a stage trains: a few fixed windows a corpus, of the calibration files.

It looks and changes nothing: weights, random numbers and what the regularizer counts are as without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from prosparse_core.distributed.checkpoint_shards import rng_state, set_rng_state
from prosparse_core.distributed.ranks import ALONE, Ranks
from prosparse_core.document_masks import forward_arguments
from prosparse_core.loss import IGNORED, next_token_loss
from prosparse_core.mixing import Batch
from prosparse_core.precision import Precision, autocast
from prosparse_core.recipe_train import Train

if TYPE_CHECKING:
    from prosparse_core.mixing import Mixture
    from prosparse_core.regularizer import L1Regularizer

LOG = "held_out.jsonl"
TOKENS = 4096
"""Of a corpus, in whole windows, at least one."""
SHARE = 0.01
"""Of the computing, by default."""
MOST = 100
"""Looks over all stages, by default."""


@dataclass(frozen=True)
class HeldOut:
    """One corpus at one step."""

    stage: int
    step: int
    corpus: str
    num_tokens: int
    """Predicted tokens."""
    lm_loss: float
    """Nats a token."""
    sparsity: float


def windows(mixture: Mixture) -> dict[str, Batch]:
    """The first calibration windows of every corpus that has some."""
    some = slice(max(1, TOKENS // mixture.seq_len))
    found = {name: mixture.calibration(name) for name in mixture.corpora}
    return {
        name: Batch(b.tokens[some], b.labels[some], b.corpora[some], None if b.positions is None else b.positions[some])
        for name, b in found.items()
        if len(b.tokens)
    }


def every(train: Train, num_tokens: int, processes: int = 1) -> int:
    """Steps between two looks at ``num_tokens`` tokens, by default.

    A look is forward passes alone, a third of what training costs a token, and every process makes all of them.
    """
    look = num_tokens * processes / (3 * train.tokens_per_step)
    return max(1, math.ceil(look / SHARE), math.ceil(train.total_steps / MOST))


class Monitor:
    """Looks at the held-out windows after a step; every process must call, and measures the same.

    Args:
        regularizer: of the stage: counts the zeros of these passes too, between those of two steps.
        batch_size: windows a pass.
        path: the log; only of the process that writes one.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: L1Regularizer,
        held_out: Mapping[str, Batch],
        *,
        stage: int,
        precision: Precision,
        batch_size: int,
        path: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._regularizer, self._held_out = model, regularizer, held_out
        self._stage, self._precision, self._batch_size = stage, precision, batch_size
        self._path, self._ranks = path, ranks

    def look(self, step: int) -> list[HeldOut]:
        """Measure every corpus, and write it down."""
        from torch.distributed.fsdp import FSDPModule

        random, was_training = rng_state(), self._model.training
        self._model.eval()
        with torch.no_grad():
            found = [self._corpus(step, name, batch) for name, batch in self._held_out.items()]
        if isinstance(self._model, FSDPModule):
            self._model.reset_iter_state()  # it waits for the backward of every forward
        self._model.train(was_training)
        set_rng_state(random)
        if self._ranks.is_first:
            with open(self._path, "a", encoding="utf-8") as log:
                log.writelines(json.dumps(asdict(one)) + "\n" for one in found)
        return found

    def _corpus(self, step: int, name: str, batch: Batch) -> HeldOut:
        device = next(self._model.parameters()).device
        nll, count = 0.0, int((batch.labels[:, 1:] != IGNORED).sum())
        for start in range(0, len(batch.tokens), self._batch_size):
            rows = slice(start, start + self._batch_size)
            x, y = batch.tokens[rows].to(device), batch.labels[rows].to(device)
            more = forward_arguments(self._model, None if batch.positions is None else batch.positions[rows])
            with autocast(self._precision, device.type):
                logits = self._model(input_ids=x, use_cache=False, **more).logits
            nll += float(next_token_loss(logits, y))
        _, _, sparsity = self._regularizer.collect()
        return HeldOut(self._stage, step, name, count, nll / max(1, count), sparsity)


def overall(found: list[HeldOut]) -> tuple[float, float]:
    """(token perplexity, sparsity) over all corpora, each token counting once."""
    tokens = sum(one.num_tokens for one in found)
    nll = sum(one.lm_loss * one.num_tokens for one in found)
    sparsity = sum(one.sparsity * one.num_tokens for one in found)
    return math.exp(min(nll / tokens, 700.0)), sparsity / tokens
