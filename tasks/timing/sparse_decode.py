"""Decoding with the FFNs of a model exchanged for sparse ones: the same tokens, and how much sooner."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput, EnvironmentProblem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prosparse_core.decode import ExchangedFFNs, GreedyDecoder, Timer

MIN_DECODE_STEPS = 8
LOGITS_TOLERANCE = 1e-2
"""Relative error of the logits; one neuron at its threshold, flipped by rounding, stays below it."""
Report = Callable[[float, float], None]


def use_sparse_ffns(
    model: nn.Module, thresholds: Sequence[float], implementation: str = "auto", threads: int = 1
) -> ExchangedFFNs:
    """Let every FFN of this model instance compute its active neurons only; the result puts the original ones back.

    Raises:
        BadInput: the thresholds are not those the model runs with, or its FFNs have no exact zeros (see
            ``ffn_thresholds``), or are exchanged already.
        EnvironmentProblem: this machine does not have the implementation that is asked for by name.
    """
    from kernels.sparse_ffn import SparseFFN
    from prosparse_core.decode import ExchangedFFNs, ffn_thresholds

    running = ffn_thresholds(model)
    if list(thresholds) != running:
        raise BadInput(f"thresholds {list(thresholds)} are not those of the model: {running}")
    try:
        exchanged = ExchangedFFNs(
            model,
            lambda ffn: SparseFFN(
                ffn.act_weight, ffn.up_weight, ffn.down_weight, running[ffn.layer], implementation, threads
            ),
        )
    except RuntimeError as error:
        raise EnvironmentProblem(str(error)) from error
    assert exchanged.count() == len(running), f"{exchanged.count()} of {len(running)} FFNs exchanged"
    return exchanged


@dataclass
class Decoding:
    """Seconds per decoded token with dense and sparse FFNs, in turns; ``problem`` says why the gate failed."""

    timer: Timer
    implementation: str
    why: str
    dense_s: list[float] = field(default_factory=list)
    sparse_s: list[float] = field(default_factory=list)
    rel_err: float = 0.0
    problem: str | None = None


def time_decoding(
    model: nn.Module,
    thresholds: Sequence[float],
    prompts: Sequence[Tensor],
    *,
    num_new: int,
    threads: int,
    budget_s: float,
    implementation: str = "auto",
    progress: Report | None = None,
    once: bool = False,
) -> Decoding:
    """Decode prompts [1, n] greedily with dense and with sparse FFNs, step by step in turns, until the budget is used.

    Both must choose the same tokens, and give the same logits within ``LOGITS_TOLERANCE``. At least
    ``MIN_DECODE_STEPS`` steps (or ``num_new``) are made; one thread is timed by the CPU time of the process, several by
    the wall clock. Where the sparse implementation falls back to dense torch, only the dense side is measured.

    Args:
        once: the prompts are long: each is read once, by the dense FFNs, and decoded from once; reading it is not in
            the budget.
    """
    from prosparse_core.decode import GreedyDecoder

    timer: Timer = "process_cpu" if threads == 1 else "wall"
    began, steps = time.monotonic(), 0

    def spent() -> float:
        return time.monotonic() - began

    with use_sparse_ffns(model, thresholds, implementation, threads) as ffns:
        first: Any = ffns.modules[0]
        result = Decoding(timer, first.implementation, first.why)
        is_sparse = first.implementation != "dense"
        for prompt in prompts if once else itertools.cycle(prompts):
            ffns.undo()
            dense = GreedyDecoder(model, prompt, timer)
            ffns.redo()
            sparse = dense.fork() if once else GreedyDecoder(model, prompt, timer)
            began = time.monotonic() if once and not steps else began
            for _ in range(num_new):
                result.problem = _disagreement(dense, sparse, result) if is_sparse else None
                if result.problem or (spent() > budget_s and steps >= MIN_DECODE_STEPS):
                    return result
                turns = [(ffns.undo, dense, result.dense_s), (ffns.redo, sparse, result.sparse_s)]
                for exchange, decoder, seconds in turns if steps % 2 else reversed(turns):
                    if decoder is dense or is_sparse:
                        exchange()
                        seconds.append(decoder.step())
                steps += 1
                if progress:
                    progress(min(spent(), budget_s), budget_s)
            result.problem = _disagreement(dense, sparse, result) if is_sparse else None
            if result.problem or spent() > budget_s:
                return result
        return result


def _disagreement(dense: GreedyDecoder, sparse: GreedyDecoder, result: Decoding) -> str | None:
    """What is wrong with the newest token of the sparse decoder; notes the error of its logits in ``result``."""
    scale = float(dense.logits.double().norm())
    error = float((sparse.logits.double() - dense.logits.double()).norm()) / (scale or 1.0)
    result.rel_err = max(result.rel_err, error) if math.isfinite(error) else math.nan
    place = len(dense.tokens)
    if dense.tokens[-1] != sparse.tokens[-1]:
        best = dense.logits.topk(2).values
        return f"token {place} differs; the dense logits of the best two are {float(best[0] - best[1]):.2g} apart"
    if not error <= LOGITS_TOLERANCE:
        return f"token {place}: the logits differ by {error:.2g} relative, {LOGITS_TOLERANCE:g} is allowed"
    return None
