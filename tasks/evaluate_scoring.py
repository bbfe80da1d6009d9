"""How evaluate runs a model under the harness: windows, padding, precision, BOS, and the sparsity meter beside them."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import ProSparseError
from prosparse_core.precision import Precision, autocast

if TYPE_CHECKING:
    from prosparse_core.sparsity import SparsityMeter


def run_task(scorer: Any, spec: dict[str, Any], limit: int | None, raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One task through the harness; its results (without samples, paths and code) are added to ``raw``."""
    from lm_eval.evaluator import evaluate as run_harness
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_defaults=False).load([spec])
    # simple_evaluate would reseed the process and call pip and git for a description of the machine: 2 s a task.
    results = run_harness(scorer, tasks, limit=limit, log_samples=True)
    assert results is not None
    for section in ("results", "versions", "n-shot", "higher_is_better", "n-samples"):
        raw.setdefault(section, {}).update(results[section])
    return results


@dataclass(frozen=True)
class Window:
    """One forward pass: the last ``len(targets)`` logits after ``inputs`` are those of ``targets``."""

    inputs: list[int]
    targets: list[int]


def windows(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[Window]:
    """Score every token of ``continuation`` once, with at most ``max_length`` inputs a window.

    With a context of one token these are the harness's own rolling windows. A context too long to leave room loses its
    beginning, so that at least half a window is scored.
    """
    assert context
    whole = [*context, *continuation]
    start, found = len(context), []
    end = min(len(whole), max(max_length + 1, start + max_length // 2))
    while start < end:
        found.append(Window(whole[max(0, end - 1 - max_length) : end - 1], whole[start:end]))
        start, end = end, min(len(whole), end + max_length)
    return found


def score_windows(
    model: Any, batch: Sequence[Window], precision: Precision, meter: SparsityMeter | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is every target the most likely token) of each window, in one forward pass.

    Windows are padded on the right, where a causal model cannot see it; the padding is kept from the meter.
    """
    import torch

    device = next(model.parameters()).device
    lengths_B = torch.tensor([len(w.inputs) for w in batch])
    inputs_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(w.inputs) for w in batch], batch_first=True).to(device)
    if meter is not None:
        mask_BT = (torch.arange(inputs_BT.shape[1]) < lengths_B[:, None]).to(device)
        meter.mask = None if bool(mask_BT.all()) else mask_BT
    scores = []
    with torch.inference_mode():
        with autocast(precision, device.type):
            logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        for window, logits_TV in zip(batch, logits_BTV, strict=True):
            end = len(window.inputs)
            logits_CV = logits_TV[end - len(window.targets) : end].float()
            targets_C = torch.tensor(window.targets, device=device)
            picked_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)
            is_greedy = bool((logits_CV.argmax(1) == targets_C).all())
            scores.append((float(picked_C.double().sum()), is_greedy))
    return scores


def make_scorer(model: Any, tokenizer: Any, *, precision: Precision, batch_size: int, max_length: int) -> Any:
    """The harness's model: HFLM with our precision, one BOS at the head of every sequence, and a sparsity meter."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer.pad_token_id is None:
        # The harness would set one on the caller's tokenizer. Which token pads is of no consequence: it is masked.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token

    class Scorer(HFLM):
        meter: SparsityMeter | None = None
        ends_prompt_as_written = False
        """A prompt ends where its format says; else the harness's rule: its last white space belongs to the answer."""
        on_progress: Callable[[float], None] = staticmethod(lambda share: None)

        def __init__(self) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
            self.num_scored: dict[tuple[str, ...], int] = {}
            self.prefix_kind = "EOS, for want of a BOS" if self.tokenizer.bos_token_id is None else "BOS"
            self.prefix = self.tokenizer.convert_ids_to_tokens(self.prefix_token_id)

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            # Special tokens are ours to add: tokenizers that add BOS themselves would get it twice.
            return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if self.ends_prompt_as_written:
                context_ids, ids = self.tok_encode(context), self.tok_encode(context + continuation)
                joins = ids[: len(context_ids)] != context_ids
                ids = self.tok_encode(continuation) if joins else ids[len(context_ids) :]
            else:
                context_ids, ids = super()._encode_pair(context, continuation)
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None or context_ids[:1] == [bos] else [bos]) + context_ids, ids

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            encoded = [(r.args, [self.prefix_token_id], self.tok_encode(r.args[0])) for r in requests]
            return [loglikelihood for loglikelihood, _ in self._loglikelihood_tokens(encoded)]

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pieces = [(i, w) for i, (_, c, k) in enumerate(requests) for w in windows(c, k, self.max_length)]
            pieces.sort(key=lambda piece: -len(piece[1].inputs))
            totals, greedy = [0.0] * len(requests), [True] * len(requests)
            done, all_inputs = 0, sum(len(w.inputs) for _, w in pieces)
            for at in range(0, len(pieces), batch_size):
                batch = pieces[at : at + batch_size]
                found = score_windows(model, [w for _, w in batch], precision, self.meter)
                for (owner, window), (loglikelihood, is_greedy) in zip(batch, found, strict=True):
                    totals[owner] += loglikelihood
                    greedy[owner] &= is_greedy
                    done += len(window.inputs)
                self.on_progress(done / all_inputs)
            for request, _, continuation in requests:
                self.num_scored[tuple(request)] = len(continuation)
            if not all(map(math.isfinite, totals)):
                raise ProSparseError("the model's log-likelihoods are not finite: its logits hold nan or inf")
            return list(zip(totals, greedy, strict=True))

    return Scorer()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it came in."""
    is_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's own progress bars and remarks: progress is reported by us, errors are raised."""
    import lm_eval.api.model
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, modules = logger.level, (lm_eval.api.model, lm_eval.api.task)
    bars = [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
