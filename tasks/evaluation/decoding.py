"""Forward passes that share what they have in common: answers to one question, questions after the same examples.

Rows are greedy and deterministic; the model's own generation settings (sampling, penalties) are not consulted.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prosparse_core.forward import last_logits_only
from prosparse_core.precision import Precision, autocast
from tasks.evaluation.growing_cache import give_room
from tasks.evaluation.shared_prefix import attending, can_share

WORTH_SHARING = 32
"""A common beginning of fewer tokens is read again with every prompt."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that have been read, and the keys and values they left."""

    ids: list[int]
    cache: Any


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """The tokens all prompts begin with, short of the last one of each; empty when they are too few to matter."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(length, min(map(len, prompts)) - 1)
    return list(first[:length]) if length >= WORTH_SHARING else []


def read_prefix(model: Any, ids: Sequence[int], precision: Precision) -> Prefix | None:
    """Read the common beginning once; None for an empty one."""
    import torch

    if not ids:
        return None
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(precision, device.type):
        out = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=True, **last_logits_only(model))
    return Prefix(list(ids), out.past_key_values)


def score_answers(
    model: Any,
    context: Sequence[int],
    answers: Sequence[Sequence[int]],
    precision: Precision,
    prefix: Prefix | None = None,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is every token the most likely one) of each answer after ``context``, read once.

    The same as one whole pass per answer up to rounding. No answer may be empty.
    """
    import torch

    device = next(model.parameters()).device
    start = len(prefix.ids) if prefix else 0
    assert prefix is None or list(context[:start]) == prefix.ids
    longest = max(map(len, answers))
    with torch.inference_mode(), autocast(precision, device.type):
        out = model(
            input_ids=torch.tensor([list(context[start:])], device=device),
            past_key_values=copy.deepcopy(prefix.cache) if prefix else None,
            use_cache=True,
            **last_logits_only(model),
        )
        logits_ACV = out.logits[:, -1:].float().expand(len(answers), -1, -1)
        if longest > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(answers))
            # Padded on the right, where a causal model cannot see it.
            ids_AC = [[*answer[:-1], *[0] * (longest - len(answer))] for answer in answers]
            rest = model(input_ids=torch.tensor(ids_AC, device=device), past_key_values=cache, use_cache=True)
            logits_ACV = torch.cat([logits_ACV, rest.logits.float()], dim=1)
    scores = []
    for answer, logits_CV in zip(answers, logits_ACV, strict=True):
        targets_C = torch.tensor(list(answer), device=device)
        logits_CV = logits_CV[: len(answer)]
        picked_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)
        scores.append((float(picked_C.double().sum()), bool((logits_CV.argmax(1) == targets_C).all())))
    return scores


def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    precision: Precision,
    *,
    max_new: int,
    is_finished: Callable[[list[int]], bool],
    prefix: Prefix | None = None,
    on_token: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """What the model goes on with after each prompt, one batch, most likely token by token.

    Args:
        max_new: at most this many tokens a row.
        is_finished: told the tokens of a row after each new one; a finished row leaves the batch.
        prefix: read before; every prompt begins with its tokens and goes on.
        on_token: called after each pass with the number of rows still running.
    """
    import torch

    device = next(model.parameters()).device
    start = len(prefix.ids) if prefix else 0
    rests = [list(p[start:]) for p in prompts]
    assert all(rests), "a prompt goes on after its prefix"
    assert prefix is None or all(list(p[:start]) == prefix.ids for p in prompts)
    longest = max(map(len, rests))
    ids_BT = torch.tensor([[0] * (longest - len(r)) + r for r in rests], device=device)
    real_BT = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rests], device=device)
    positions_BT = start + (real_BT.cumsum(1) - 1).clamp(min=0)
    cache, beginning = None, None
    if prefix is not None and can_share(model, prefix.cache):
        mask_BT, beginning = real_BT, prefix.cache
    else:
        mask_BT = torch.cat([torch.ones(len(rests), start, dtype=real_BT.dtype, device=device), real_BT], dim=1)
        if prefix is not None:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(rests))
    found: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    sharing = attending(model, beginning) if beginning is not None else contextlib.nullcontext()
    with torch.inference_mode(), autocast(precision, device.type), sharing:
        for _ in range(max_new):
            out = model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                **last_logits_only(model),
            )
            cache, next_B = out.past_key_values, out.logits[:, -1].argmax(1)
            if not found[running[0]]:
                give_room(cache, torch.bfloat16 if precision == "bf16" else None)
            for row, token in zip(running, next_B.tolist(), strict=True):
                found[row].append(token)
            keep = [i for i, row in enumerate(running) if not is_finished(found[row])]
            on_token(len(keep))
            if not keep:
                break
            ids_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            if len(keep) < len(running):
                kept = torch.tensor(keep, device=device)
                running = [running[i] for i in keep]
                cache.batch_select_indices(kept)
                ids_BT, positions_BT, mask_BT = ids_BT[kept], positions_BT[kept], mask_BT[kept]
    return found
