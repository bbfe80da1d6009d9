"""What evaluate asks the harness: held-out files as lm-eval tasks, and their results as scores with standard errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import ASSISTANT, SYSTEM, USER, from_row
from prosparse_core.errors import BadInput

EVALUATION = "evaluation"
CHOICES_FILE = "choices.jsonl"
CHOICES_TASK = "code-choices"
NO_CHOICES = "the held-out data has no multiple-choice questions"
TASK_VERSION = 1
DENOMINATORS = {
    "token_perplexity": "tokens",
    "word_perplexity": "words",
    "byte_perplexity": "bytes",
    "bits_per_byte": "bytes",
}
"""Metrics of a corpus and what each counts; papers print token perplexity."""


@dataclass(frozen=True)
class Score:
    """One measured number. ``n`` counts what the value is a mean over: tokens, words, bytes or questions."""

    metric: str
    value: float | None
    """None is n/a, and ``note`` says why."""
    stderr: float | None
    n: int
    higher_is_better: bool
    corpus: str | None = None
    task: str | None = None
    headline: bool = False
    partial: bool = False
    """Fewer documents were measured than there are."""
    note: str | None = None
    num_fewshot: int = 0
    share: float | None = None
    """Of the corpus in the training mixture."""
    window_tokens: int | None = None
    num_documents: int | None = None
    documents: str | None = None
    """Digest of the documents behind ``sums``, of a headline score; None where they are not kept."""
    sums: tuple[float, ...] = ()
    """What each document contributes: nats of its scored tokens, or its score."""
    counts: tuple[float, ...] = ()
    """Of how much: scored tokens, or 1."""
    part_of: str | None = None
    """The group that the task counts into."""

    @property
    def row(self) -> dict[str, Any]:
        """The score without its documents: a row of the ledger's evaluations, but for the conditions."""
        left_out = ("partial", "documents", "sums", "counts", "part_of")
        return {key: value for key, value in vars(self).items() if key not in left_out}


@dataclass(frozen=True)
class HeldOut:
    """The evaluation files of a prepared mixture, read and checked: rows by corpus, and questions."""

    corpora: dict[str, list[dict[str, Any]]]
    choices: list[dict[str, Any]] | None
    """None where they are not wanted, empty where there are none."""
    seq_len: int
    shares: dict[str, float] = field(default_factory=dict)
    """Of each corpus in the training mixture, where the manifest has them."""

    def sizes(self, limit: int | None) -> list[int]:
        """Characters to be read per task, corpora first: how long each takes, roughly."""
        sizes = [sum(from_row(row).num_chars for row in rows[:limit]) for rows in self.corpora.values()]
        if self.choices:
            chosen = self.choices[:limit]
            sizes.append(sum(len(r["question"]) * len(r["choices"]) + sum(map(len, r["choices"])) for r in chosen))
        return sizes


def read_held_out(folder: Path, corpora: Sequence[str] | None = None, *, choice: bool = True) -> HeldOut:
    """The held-out evaluation files under ``folder`` (a mixture artifact's), checked before any model is loaded.

    Args:
        corpora: which; None means all of the manifest, in its order.
        choice: also read the multiple-choice questions.

    Raises:
        BadInput: no manifest, an unknown corpus, a missing or empty file, or a line that is not as documented.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        known = [str(entry["name"]) for entry in manifest["corpora"]]
        shares = {str(e["name"]): float(e["share"]) for e in manifest["corpora"] if "share" in e}
        seq_len = int(manifest["seq_len"])
    except OSError as error:
        raise BadInput(f"{folder} holds no held-out data: no manifest.json to read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'manifest.json'} is not the manifest of a mixture: {error!r}") from error
    for name in corpora or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise BadInput(
                f"unknown corpus {name!r} in {folder}",
                hint=f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}",
            )
    wanted = list(known if corpora is None else corpora)
    if not wanted:
        raise BadInput(f"no corpus to evaluate on in {folder}", hint=f"there are: {', '.join(known) or 'none'}")
    rows = {name: _read_jsonl(folder / EVALUATION / f"{name}.jsonl", _document) for name in wanted}
    questions: list[dict[str, Any]] | None = None
    if choice:
        path = folder / EVALUATION / CHOICES_FILE
        questions = _read_jsonl(path, _question, may_be_empty=True) if path.exists() else []
    return HeldOut(rows, questions, seq_len, shares)


def _read_jsonl(
    path: Path, check: Callable[[Any], dict[str, Any]], *, may_be_empty: bool = False
) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the held-out file {path}: {error}", hint="prepare the mixture again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(check(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise BadInput(f"{path}, line {number}: {what}", hint="prepare the mixture again") from error
    if not rows and not may_be_empty:
        raise BadInput(f"the held-out file {path} is empty", hint="prepare the mixture again")
    return rows


def _document(row: Any) -> dict[str, Any]:
    text, prompt = row["text"], row.get("prompt")
    if not isinstance(text, str) or not text:
        raise ValueError(f"text must be a string that is not empty, not {text!r}")
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt must be a string, not {prompt!r}")
    messages = {"messages": _messages(row["messages"])} if "messages" in row else {}
    return {"id": str(row["id"]), "file": str(row.get("file", "")), "prompt": prompt, "text": text, **messages}


def _messages(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages must be a list of turns, not {turns!r}")
    for turn in turns:
        if not isinstance(turn["content"], str) or turn["role"] not in (SYSTEM, USER, ASSISTANT):
            raise ValueError(f"a turn has a role and a content that is a string, not {turn!r}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _question(row: Any) -> dict[str, Any]:
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a string that is not empty, not {question!r}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError("choices must be two or more strings that are not empty")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer!r} is no place in the {len(choices)} choices")
    return {"id": str(row["id"]), "question": question, "choices": choices, "answer": answer}


def corpus_task(
    name: str, rows: Sequence[dict[str, Any]], contexts: Sequence[str | None], num_scored: dict[tuple[str, ...], int]
) -> dict[str, Any]:
    """The perplexity of a corpus as an lm-eval task: rolling, or of the answers only where documents have a context.

    Args:
        rows: with ``text``, and where that is only a part of what is read (the turns of the assistant), ``read``.
        contexts: per row what precedes its text without being scored; all None or none of them.
        num_scored: request -> number of tokens scored, as the harness's model fills it.
    """
    is_conditional = contexts[0] is not None
    assert all((c is not None) == is_conditional for c in contexts)

    def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, tuple[float, int]]:
        loglikelihood = results[0][0] if is_conditional else results[0]
        key = (doc["context"], doc["text"]) if is_conditional else (doc["read"],)
        counts = {
            "tokens": num_scored[key],
            "words": len(doc["text"].split()) or 1,
            "bytes": len(doc["text"].encode("utf-8")),
        }
        return {metric: (loglikelihood, counts[unit]) for metric, unit in DENOMINATORS.items()}

    documents = [
        {"context": c or "", "text": row["text"], "read": row.get("read", row["text"])}
        for row, c in zip(rows, contexts, strict=True)
    ]
    return {
        **_common(name, documents),
        "output_type": "loglikelihood" if is_conditional else "loglikelihood_rolling",
        "doc_to_text": "context" if is_conditional else "",
        "doc_to_target": "text" if is_conditional else "read",
        "process_results": process_results,
        "metric_list": [{"metric": m, "aggregation": _aggregation(m), "higher_is_better": False} for m in DENOMINATORS],
    }


def choices_task(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Docstring -> function body among a few, as an lm-eval task."""
    documents = [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]
    return {
        **_common(CHOICES_TASK, documents),
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }


def _common(name: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    def load(**_: Any) -> dict[str, Any]:
        # In memory: nothing is written to the user's dataset cache, and no hub is asked.
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": TASK_VERSION},
    }


def _aggregation(metric: str) -> Callable[[Sequence[tuple[float, int]]], float]:
    def aggregate(items: Sequence[tuple[float, int]]) -> float:
        return ratio_score(metric, items)[0]

    return aggregate


def ratio_score(metric: str, items: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """A metric of ``DENOMINATORS`` and its standard error from (log-likelihood in nats, count) per document.

    The value rests on the ratio r = sum(nll) / sum(count). Its error is the delta method's over documents (the tokens
    of a document are not independent): Var(r) = D/(D-1) * sum((nll_d - r * count_d)^2) / sum(count)^2, then times the
    derivative. One document has no standard error (None); a value beyond a double is ``inf``.
    """
    total = sum(count for _, count in items)
    if not total:
        return math.nan, None
    ratio = -math.fsum(loglikelihood for loglikelihood, _ in items) / total
    if metric == "bits_per_byte":
        value = ratio / math.log(2)
        slope = 1 / math.log(2)
    else:
        value = slope = math.exp(ratio) if ratio < 700 else math.inf
    if len(items) < 2 or math.isinf(value):
        return value, None
    squares = math.fsum((-loglikelihood - ratio * count) ** 2 for loglikelihood, count in items)
    return value, slope * math.sqrt(len(items) / (len(items) - 1) * squares) / total


def digest_of(documents: Iterable[str]) -> str:
    """What tells whether two lists of documents are the same, in the same order."""
    return hashlib.blake2b("\0".join(documents).encode(errors="surrogatepass"), digest_size=12).hexdigest()


def by_document(names: Sequence[str], samples: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """(names, samples) with the spans of one document as one: they are not independent.

    Args:
        names: of the document of each sample.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, sample in zip(names, samples, strict=True):
        whole = found.setdefault(name, dict.fromkeys(DENOMINATORS, (0.0, 0)))
        for metric in DENOMINATORS:
            whole[metric] = tuple(a + b for a, b in zip(whole[metric], sample[metric], strict=True))
    return list(found), list(found.values())


def corpus_scores(corpus: str, samples: Sequence[dict[str, Any]], documents: str, **known: Any) -> list[Score]:
    """Every metric of a corpus from one sample per document; ``known`` are fields of the scores, ``note`` among them.

    Args:
        documents: the digest of which they are.
    """
    note = known.pop("note")
    scores = []
    for metric in DENOMINATORS:
        items = [(float(sample[metric][0]), int(sample[metric][1])) for sample in samples]
        value, stderr = ratio_score(metric, items)
        is_known = math.isfinite(value)
        scores.append(
            Score(
                metric,
                value if is_known else None,
                stderr,
                n=sum(count for _, count in items),
                higher_is_better=False,
                corpus=corpus,
                headline=metric == "token_perplexity",
                note=note if is_known else f"beyond the range of a double; {note}",
                num_documents=len(samples),
                **(_contributions(items, documents) if metric == "token_perplexity" else {}),
                **known,
            )
        )
    return scores


def _contributions(items: Sequence[tuple[float, int]], documents: str) -> dict[str, Any]:
    return {
        "documents": documents,
        "sums": tuple(-loglikelihood for loglikelihood, _ in items),
        "counts": tuple(float(count) for _, count in items),
    }
