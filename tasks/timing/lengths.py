"""Decoding timed after prompts of every length that the recipe asks for: natively, or by transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prosparse_core.recipe import Speed
from prosparse_core.store import Artifact
from prosparse_core.variants import Variant
from tasks.step import Work
from tasks.timing import llama_cpp_peer
from tasks.timing.decode import Peers, pack_models, time_ways
from tasks.timing.facts import Reporter
from tasks.timing.native_decode import runs_silu, supports
from tasks.timing.prompts import LONG, Prompts, choose_prompts, drop_dear
from tasks.timing.sparse_decode import time_decoding
from tasks.timing.thresholds import raised_thresholds

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST_SHARE = 0.5
"""Of the time, for the shortest prompts, where there are others."""
MOST_CACHES = 7
"""Keys and values kept at a time: of two types and two kinds of masks, of predictors, and two of transformers."""
Report = Callable[[float, float], None]


@dataclass(frozen=True)
class Case:
    """A model to decode with, and what belongs to it."""

    work: Work
    section: Speed
    model: nn.Module
    sparsity: float
    original: Variant | None
    """The dense model, which other engines decode."""
    predictors: Artifact | None
    report: Reporter

    @property
    def config(self) -> Any:
        return self.model.config


def time_every_length(
    case: Case, windows: Sequence[tuple[str, Tensor]], *, is_native: bool, budget_s: float, progress: Report
) -> None:
    """Decode after prompts of each length, the shortest first; what is not possible is reported with its reason."""
    config, section = case.config, case.section
    positions = _positions(config)
    prompts = choose_prompts(windows, section.decode_prompts, positions)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    a_cache = 2 * 4 * config.num_hidden_layers * kv_heads * head_dim
    drop_dear(prompts, case.model, section.budget_s, MOST_CACHES * a_cache)
    if prompts.by_length:
        _time_them(case, prompts, is_native, budget_s, progress)
    case.report.absent_prompts(prompts.absent)


def _positions(config: Any) -> int:
    """How many tokens a model takes; architectures whose positions have no end (ALiBi) do not say."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _time_them(case: Case, prompts: Prompts, is_native: bool, budget_s: float, progress: Report) -> None:
    lengths = list(prompts.by_length)
    positions, asked = _positions(case.config), case.section.decode_tokens
    new = {n: min(asked, positions - n) for n in lengths}
    native = is_native and supports(case.config.model_type) and fits(case.model, 4)
    native_way = _Native(case, prompts, max(n + new[n] for n in lengths)) if native else None
    done = 0.0
    for n in lengths:
        share = 1.0 if len(lengths) == 1 else FIRST_SHARE if n == lengths[0] else (1 - FIRST_SHARE) / (len(lengths) - 1)

        def part(spent: float, total: float, done: float = done, share: float = share) -> None:
            progress(done + share * min(1.0, spent / max(total, 1e-9)), 1.0)

        if native_way is not None:
            native_way.time(n, new[n], share * budget_s, part)
        else:
            _time_transformers(case, n, prompts.by_length[n], new[n], share * budget_s, part)
        done += share


def _time_transformers(
    case: Case, length: int, prompts: Sequence[Tensor], num_new: int, budget_s: float, progress: Report
) -> None:
    """With sparse FFNs in the model and with its own, in turns."""
    from prosparse_core.decode import ffn_thresholds

    decoded = time_decoding(
        case.model,
        ffn_thresholds(case.model),
        prompts,
        num_new=num_new,
        threads=case.section.threads,
        budget_s=budget_s,
        progress=progress,
        once=length >= LONG,
    )
    case.report.decoding(case.model, decoded, case.sparsity, length)


class _Native:
    """Every way to decode, in turns; what is made once serves all lengths."""

    def __init__(self, case: Case, prompts: Prompts, capacity: int) -> None:
        from prosparse_core.decode import ffn_thresholds

        model, section, report = case.model, case.section, case.report
        self._case, self._prompts = case, prompts
        is_silu = runs_silu(model)
        self._thresholds = [0.0] * case.config.num_hidden_layers if is_silu else ffn_thresholds(model)
        goal, raised, self._about = section.raised_sparsity, None, None
        if goal is not None and not is_silu and case.sparsity < goal:
            first = next(iter(prompts.by_length.values()))[0]
            raised = raised_thresholds(model, self._thresholds, first, goal)
            self._about = f"thresholds raised to {goal:.0%} of each layer's gates, for timing only"
        elif goal is not None and not is_silu:
            asked = f"{goal:.0%} were asked"
            case.work.progress.note(f"no thresholds are raised: the model is {case.sparsity:.1%} sparse, {asked}")
        loaded, source, cutoffs = load_predictors(case.predictors, case.config.num_hidden_layers)
        self._original = case.original.id if case.original else None
        others, why = llama_cpp_peer.ways(case.original, case.work.folder, capacity, section.threads)
        if why is not None:
            report.missing(llama_cpp_peer.PROVIDER, llama_cpp_peer.DTYPE, self._original, why)
        sixteen = sixteen_bits(model) if fits(model, 4 + 2) else None
        if sixteen is None:
            report.missing("native_dense", "float16", None, "the memory does not hold another copy of the weights")
        self._peers = Peers(raised, sixteen, loaded, source, cutoffs, others)
        self._packed = pack_models(model, self._peers, capacity)

    def time(self, length: int, num_new: int, budget_s: float, progress: Report) -> None:
        ways = time_ways(
            self._case.model,
            self._thresholds,
            self._prompts.by_length[length],
            self._peers,
            num_new=num_new,
            threads=self._case.section.threads,
            budget_s=budget_s,
            progress=progress,
            packed=self._packed,
            once=length >= LONG,
            between=self._case.report.probe,
        )
        self._case.report.ways(self._case.model, ways, self._about, self._original, length)


def fits(model: nn.Module, bytes_per_weight: int) -> bool:
    """Whether the memory that is free now holds copies of so many bytes a weight, with room to spare."""
    import psutil

    needed = bytes_per_weight * sum(p.numel() for p in model.parameters())
    return bool(1.2 * needed < psutil.virtual_memory().available)


def sixteen_bits(model: nn.Module) -> Any:
    """float16, what other engines store; bfloat16 for weights beyond its range."""
    import torch

    largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.ndim > 1)
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16


def load_predictors(predictors: Artifact | None, num_layers: int) -> tuple[list[Any], Any, list[float]]:
    """(one predictor a layer, what they read, their cutoffs); nothing of all that without an artifact."""
    if predictors is None:
        return [], "post_norm", []
    from prosparse_core.predictor import load

    meta = predictors.meta()
    layers = [load(predictors.path, i) for i in range(num_layers)]
    return layers, meta["input"], [entry["cutoff"] for entry in meta["per_cutoff"]]
