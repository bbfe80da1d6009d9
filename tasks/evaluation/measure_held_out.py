"""A mixture's held-out corpora and questions through the harness: perplexity, sparsity of the same passes, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import from_row
from prosparse_core.data.packing import Encoder
from prosparse_core.errors import BadInput
from prosparse_core.precision import Precision
from prosparse_core.progress import Progress, Silent
from prosparse_core.sparsity import SparsityMeter
from tasks.evaluation.evaluation import Evaluation, add_raw, harness_version
from tasks.evaluation.held_out import (
    CHOICES_TASK,
    NO_CHOICES,
    HeldOut,
    Score,
    by_document,
    choices_task,
    corpus_scores,
    corpus_task,
    digest_of,
    read_held_out,
)
from tasks.evaluation.parts import Part, Parts
from tasks.evaluation.scores import harness_scores
from tasks.evaluation.scoring import evaluating, load_task, make_scorer, quiet, run_task


def measure_loaded(
    model: Any,
    tokenizer: Any,
    folder_of_heldout: Path,
    *,
    corpora: list[str] | None = None,
    choice: bool = True,
    **how: Any,
) -> Evaluation:
    """:func:`measure_held_out` on a mixture's evaluation files, read and checked first.

    Raises:
        BadInput: see :func:`tasks.evaluation.held_out.read_held_out` and :func:`measure_held_out`.
    """
    return measure_held_out(model, tokenizer, read_held_out(folder_of_heldout, corpora, choice=choice), **how)


def measure_held_out(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    precision: Precision,
    batch_size: int,
    limit: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> Evaluation:
    """Perplexity and sparsity of every corpus, then the multiple-choice questions; changes nothing in the model.

    Args:
        limit: at most this many documents per task; marks what it cuts as partial.
        max_length: tokens per window; default ``seq_len``, as in training. Never beyond the model's context.
        parts: what an interrupted attempt has measured is taken from there, and what is measured now is kept there.

    Raises:
        BadInput: the tokenizer has neither BOS nor EOS, or makes no token of a whole corpus.
        ProSparseError: the model's log-likelihoods are not finite.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit}: at least 1 document per task")
    progress, parts = progress or Silent(), parts or Parts()
    context = getattr(model.config, "max_position_embeddings", None)
    max_length = max_length or held_out.seq_len
    max_length = min(max_length, context) if context else max_length
    encoder = Encoder(tokenizer)
    sizes = held_out.sizes(limit)
    found: dict[str, Part] = {}
    with quiet(), evaluating(model):
        scorer = make_scorer(model, tokenizer, precision=precision, batch_size=batch_size, max_length=max_length)
        about = f"prefix {scorer.prefix} ({scorer.prefix_kind}), windows of {max_length} tokens"

        def follow(task: str, number: int) -> None:
            before, size = sum(sizes[:number]), sizes[number]
            scorer.on_progress = lambda share: progress.update(before + share * size, sum(sizes), task=task)

        for number, (corpus, rows) in enumerate(held_out.corpora.items()):
            follow(corpus, number)
            share = held_out.shares.get(corpus)
            measure = partial(_measure_corpus, scorer, model, encoder, corpus, rows, limit, about, share)
            found[corpus] = parts.get(f"corpus {corpus}", measure)
        if held_out.choices:
            follow(CHOICES_TASK, len(found))
            measure = partial(_measure_choices, scorer, held_out.choices, limit, about)
            found[CHOICES_TASK] = parts.get(f"questions {CHOICES_TASK}", measure)
    scores = [score for part in found.values() for score in part.scores]
    if held_out.choices is not None and not held_out.choices:
        scores.append(Score("acc", None, None, 0, True, task=CHOICES_TASK, headline=True, note=NO_CHOICES))
    conditions = {
        "precision": precision,
        "batch_size": batch_size,
        "max_length": max_length,
        "prefix": scorer.prefix,
        "limit": limit,
        "harness_version": harness_version(),
    }
    raw: dict[str, dict[str, Any]] = {}
    add_raw(raw, *(part.raw for part in found.values()))
    layers = {corpus: found[corpus].layers for corpus in held_out.corpora}
    return Evaluation(tuple(scores), layers, conditions, raw)


def _measure_corpus(
    scorer: Any,
    model: Any,
    encoder: Encoder,
    corpus: str,
    rows: Sequence[dict[str, Any]],
    limit: int | None,
    about: str,
    share: float | None,
) -> Part:
    raw: dict[str, dict[str, Any]] = {}
    rows, labels = _conversations(corpus, rows, encoder, scorer.prefix_token_id)
    contexts = _contexts(corpus, rows, encoder)
    with SparsityMeter(model) as meter:
        scorer.meter, scorer.ends_prompt_as_written, scorer.labels = meter, True, labels
        results = run_task(scorer, load_task(corpus_task(corpus, rows, contexts, scorer.num_scored)), limit, raw)
        scorer.meter, scorer.ends_prompt_as_written, scorer.labels = None, False, {}
        samples = results["samples"][corpus]
        if not any(sample["token_perplexity"][1] for sample in samples):
            raise BadInput(f"corpus {corpus!r}: the tokenizer makes not one token of its documents")
        layers = tuple(meter.layers())
    read = [rows[sample["doc_id"]] for sample in samples]
    names, whole = by_document([row["id"] for row in read], samples)
    note = f"stderr by the delta method over {len(names)} documents; {about}"
    note += "; loss on the answers only" if contexts[0] is not None else ""
    note += "; loss on the assistant's turns only" if labels else ""
    scores = corpus_scores(
        corpus,
        whole,
        digest_of(part for row in read for part in (row["id"], row["prompt"] or "", row.get("read", row["text"]))),
        partial=len(samples) < len(rows),
        note=note,
        share=share,
        window_tokens=scorer.max_length,
    )
    return Part(tuple(scores), raw, layers)


def _measure_choices(scorer: Any, choices: Sequence[dict[str, Any]], limit: int | None, about: str) -> Part:
    raw: dict[str, dict[str, Any]] = {}
    results = run_task(scorer, load_task(choices_task(choices)), limit, raw)
    is_partial = len(results["samples"][CHOICES_TASK]) < len(choices)
    return Part(tuple(harness_scores(results, CHOICES_TASK, headline="acc", partial=is_partial, note=about)), raw)


def _conversations(
    corpus: str, rows: Sequence[dict[str, Any]], encoder: Encoder, prefix: int
) -> tuple[Sequence[dict[str, Any]], dict[str, tuple[list[int], list[bool], list[int]]]]:
    """The rows of a corpus of conversations with the text that is read of each (``read``); and by that text its tokens
    after the prefix, with those of the assistant's turns marked, as in training.
    """
    documents = [from_row(row) for row in rows]
    if all(document.turns is None for document in documents):
        return rows, {}
    if any(document.turns is None for document in documents):
        raise BadInput(f"corpus {corpus!r} mixes conversations and other documents", hint="prepare the mixture again")
    read = [encoder.written(document) for document in documents]
    labels = {}
    for text, encoded in zip(read, encoder.encode(documents), strict=True):
        tokens = [*encoder.lead(is_chat=True), *encoded.tokens.tolist()]
        start = 1 + int(tokens[:2] == [prefix, prefix])  # the plain format writes a BOS of its own
        mask = encoded.mask.astype(bool).tolist()
        labels[text] = (tokens[start:], mask[len(mask) - len(tokens) + start :], tokens[:1])
    return [{**row, "read": text} for row, text in zip(rows, read, strict=True)], labels


def _contexts(corpus: str, rows: Sequence[Mapping[str, Any]], encoder: Any) -> list[str | None]:
    """What precedes each text unscored: its prompt, written as in training."""
    prompts = [row["prompt"] for row in rows]
    if all(p is None for p in prompts):
        return [None] * len(rows)
    if None in prompts:
        raise BadInput(f"corpus {corpus!r} mixes documents with and without a prompt", hint="prepare the mixture again")
    before, between, _ = encoder.chat_format()
    return [f"{before}{p}{between}" for p in prompts]
