"""How evaluate runs a model under the harness: windows, padding, precision, separator, stops, the sparsity meter."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import ProSparseError
from prosparse_core.precision import Precision, autocast
from tasks.evaluation.decoding import common_prefix, decode_greedily, read_prefix, score_answers

if TYPE_CHECKING:
    from prosparse_core.sparsity import SparsityMeter


FEWSHOT_SEED = 1234
"""Which examples stand before a question, where a task draws them; the harness's own default."""


def load_task(spec: dict[str, Any]) -> Any:
    """A task of the harness from its settings, with its data read and its few-shot examples made repeatable."""
    from lm_eval.tasks import TaskManager

    (task,) = TaskManager(include_defaults=False).load([spec])["tasks"].values()
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def run_task(scorer: Any, task: Any, limit: int | None, raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One task through the harness; its results (without samples, paths and code) are added to ``raw``.

    Standard errors are ours to compute: the harness resamples 100,000 times where there is no formula.
    """
    from lm_eval.evaluator import evaluate as run_harness

    # simple_evaluate would reseed the process and call pip and git for a description of the machine: 2 s a task.
    tasks = {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}
    results = run_harness(scorer, tasks, limit=limit, log_samples=True, bootstrap_iters=0)
    assert results is not None
    for section in ("results", "versions", "n-shot", "higher_is_better", "n-samples"):
        raw.setdefault(section, {}).update(results[section])
    return results


def questions(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> dict[tuple[int, ...], list[int]]:
    """Contexts that several answers follow, all within ``max_length``, with the places of their answers."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        found.setdefault(tuple(context), []).append(i)
    return {
        context: members
        for context, members in found.items()
        if len(members) > 1 and all(0 < len(pairs[i][1]) <= max_length + 1 - len(context) for i in members)
    }


@dataclass(frozen=True)
class Window:
    """One forward pass: the last ``len(targets)`` logits after ``inputs`` are those of ``targets``."""

    inputs: list[int]
    targets: list[int]
    labels: list[bool] | None = None
    """Which targets count; None: all."""


def windows(
    context: Sequence[int], continuation: Sequence[int], max_length: int, labels: Sequence[bool] | None = None
) -> list[Window]:
    """Score every token of ``continuation`` (of which only those with a label count) once, with at most ``max_length``
    inputs a window.

    With a context of one token these are the harness's own rolling windows. A context too long to leave room loses its
    beginning, so that at least half a window is scored.
    """
    assert context
    whole = [*context, *continuation]
    start, found = len(context), []
    end = min(len(whole), max(max_length + 1, start + max_length // 2))
    while start < end:
        counted = None if labels is None else list(labels[start - len(context) : end - len(context)])
        found.append(Window(whole[max(0, end - 1 - max_length) : end - 1], whole[start:end], counted))
        start, end = end, min(len(whole), end + max_length)
    return found


def score_windows(
    model: Any, batch: Sequence[Window], precision: Precision, meter: SparsityMeter | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is every target the most likely token) of each window, in one forward pass.

    Windows are padded on the right, where a causal model cannot see it; the padding is kept from the meter.
    """
    import torch

    from prosparse_core.loss import log_likelihoods

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
            logits_CV = logits_TV[end - len(window.targets) : end]
            targets_C = torch.tensor(window.targets, device=device)
            picked_C, _ = log_likelihoods(logits_CV, targets_C)
            if window.labels is not None:
                picked_C = picked_C[torch.tensor(window.labels, device=device)]
            is_greedy = bool((logits_CV.argmax(1) == targets_C).all())
            scores.append((float(picked_C.double().sum()), is_greedy))
    return scores


def make_scorer(model: Any, tokenizer: Any, *, precision: Precision, batch_size: int, max_length: int) -> Any:
    """The harness's model: HFLM with our precision, one separator before every sequence, and a sparsity meter."""
    from lm_eval.models.huggingface import HFLM

    from prosparse_core.data.packing import Encoder

    encoder = Encoder(tokenizer)

    if tokenizer.pad_token_id is None:
        # The harness would set one on the caller's tokenizer. Which token pads is of no consequence: it is masked.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token

    class Scorer(HFLM):
        meter: SparsityMeter | None = None
        ends_prompt_as_written = False
        """A prompt ends where its format says; else the harness's rule: its last white space belongs to the answer."""
        labels: Mapping[str, tuple[Sequence[int], Sequence[bool], list[int]]] = MappingProxyType({})
        """Of conversations: their tokens, which of them the assistant says (only these are scored), and what stands
        before: the separator, or the first token that a chat template writes."""
        on_progress: Callable[[float], None] = staticmethod(lambda share: None)

        def __init__(self) -> None:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                prefix_token_id=encoder.separator.before,
            )
            self.num_scored: dict[tuple[str, ...], int] = {}
            self.num_truncated = 0
            self.prefix_kind = "BOS" if encoder.prefix else "between documents, in training as here"
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
            return self._lead(context_ids) + context_ids, ids

        def _lead(self, ids: list[int]) -> list[int]:
            """What goes before a context, unless it is written there already."""
            is_led = ids[:1] in ([self.prefix_token_id], [self.tokenizer.bos_token_id])
            return [] if is_led else encoder.lead(is_chat=self.ends_prompt_as_written)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            encoded = []
            for request in requests:
                if self.labels:
                    ids, _, head = self.labels[request.args[0]]
                else:
                    ids, head = self.tok_encode(request.args[0]), [self.prefix_token_id]
                encoded.append((request.args, head, ids))
            return [loglikelihood for loglikelihood, _ in self._loglikelihood_tokens(encoded)]

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            totals, greedy = [0.0] * len(requests), [True] * len(requests)
            # What is metered is read as it stands: shared tokens would count once.
            shared = {} if self.meter is not None else questions([r[1:] for r in requests], self.max_length)
            together = {i for members in shared.values() for i in members}
            pieces = [
                (i, w)
                for i, (r, c, k) in enumerate(requests)
                if i not in together
                for w in windows(c, k, self.max_length, self.labels[r[0]][1] if self.labels else None)
            ]
            pieces.sort(key=lambda piece: -len(piece[1].inputs))
            done, all_inputs = 0, sum(map(len, shared)) + sum(len(w.inputs) for _, w in pieces)
            prefix = read_prefix(model, common_prefix(list(shared)), precision)
            for context, members in shared.items():
                answers = [requests[i][2] for i in members]
                for i, score in zip(members, score_answers(model, context, answers, precision, prefix), strict=True):
                    totals[i], greedy[i] = score
                done += len(context)
                self.on_progress(done / all_inputs)
            for at in range(0, len(pieces), batch_size):
                batch = pieces[at : at + batch_size]
                found = score_windows(model, [w for _, w in batch], precision, self.meter)
                for (owner, window), (loglikelihood, is_greedy) in zip(batch, found, strict=True):
                    totals[owner] += loglikelihood
                    greedy[owner] &= is_greedy
                    done += len(window.inputs)
                self.on_progress(done / all_inputs)
            for request, _, continuation in requests:
                counted = self.labels[request[0]][1] if self.labels else [True] * len(continuation)
                self.num_scored[tuple(request)] = sum(counted)
            if not all(map(math.isfinite, totals)):
                raise ProSparseError("the model's log-likelihoods are not finite: its logits hold nan or inf")
            return list(zip(totals, greedy, strict=True))

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            """Greedy continuations up to a stop string; each prompt follows one separator, also with its front cut."""
            settings = requests[0].args[1]
            assert all(r.args[1] == settings for r in requests), "one task at a time"
            if settings.get("do_sample"):
                raise ProSparseError(
                    "this task samples its answers, which cannot be repeated: only greedy ones are measured"
                )
            stops = [settings["until"]] if isinstance(settings["until"], str) else list(settings["until"])
            max_new = min(int(settings["max_gen_toks"]), max(1, self.max_length // 2))
            prompts = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                head = self._lead(ids) or ids[:1]
                ids = ids[1:] if ids[:1] == head else ids
                room = self.max_length - max_new - 1
                self.num_truncated += len(ids) > room
                prompts.append(head + ids[max(0, len(ids) - room) :])
            ends = {self.tokenizer.eos_token_id, *encoder.suffix} - {None}
            # A stop string of n bytes lies within the last n tokens, and within n more where a token is half of one.
            tail = 2 * max((len(stop.encode()) for stop in stops), default=0)

            def is_finished(ids: list[int]) -> bool:
                text = self.tokenizer.decode(ids[-tail:]) if stops else ""
                return ids[-1] in ends or any(stop in text for stop in stops)

            prefix = read_prefix(model, common_prefix([tuple(p) for p in prompts]), precision)
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            texts = [""] * len(prompts)
            for at in range(0, len(order), batch_size):
                rows = order[at : at + batch_size]
                passes = itertools.count(1)

                def tell(left: int, at: int = at, size: int = len(rows), passes: Iterator[int] = passes) -> None:
                    self.on_progress((at + size * next(passes) / max_new) / len(order))

                found = decode_greedily(
                    model,
                    [prompts[i] for i in rows],
                    precision,
                    max_new=max_new,
                    is_finished=is_finished,
                    prefix=prefix,
                    on_token=tell,
                )
                for i, ids in zip(rows, found, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[i] = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
                self.on_progress((at + len(rows)) / len(order))
            return texts

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
    import datasets.utils
    import lm_eval.api.model
    import lm_eval.api.task

    shows_bars = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level, modules = logger.level, (lm_eval.api.model, lm_eval.api.task)
    bars = [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        if shows_bars:
            datasets.utils.enable_progress_bars()
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
