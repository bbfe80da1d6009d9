"""The vocabulary of a Hugging Face folder as the GGUF of late 2023 spells it: ``gpt2`` (byte-level BPE) or ``llama``.

PowerInfer has two tokenizers built in. ``gpt2`` splits text by one fixed regular expression before it merges; ``llama``
is SentencePiece's BPE, which merges the pair whose piece has the largest score. What a model's own tokenizer does
besides cannot be said in the file; ``Vocabulary.notes`` names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """Every id from 0 to the number of embedding rows - 1 has a token, a score and a type."""

    kind: str
    """``gpt2`` or ``llama``."""
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    """``"left right"``, the earliest first; empty for ``llama``."""
    bos: int | None
    eos: int | None
    notes: tuple[str, ...]
    """Where PowerInfer's own tokenizer will split text differently."""


def read_vocabulary(folder: Path, num_rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of ``tokenizer.json``; ids without a token, up to ``num_rows``, are unused ones.

    Raises:
        BadInput: no such file, a tokenizer of another kind than BPE, or more tokens than embedding rows.
    """
    path = folder / "tokenizer.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model = found["model"]
        vocabulary, added = dict(model["vocab"]), found.get("added_tokens") or []
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: not readable as a BPE tokenizer: {error!r}",
            hint="PowerInfer knows byte-level BPE and SentencePiece BPE; save the model with a fast tokenizer of these",
        ) from error
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    steps = _steps(found.get("pre_tokenizer"))
    if kind == "gpt2" and "ByteLevel" not in {s.get("type") for s in steps}:
        raise BadInput(f"{path}: neither byte-level BPE nor BPE with byte fallback", hint="PowerInfer knows no other")
    tokens: list[str | None] = [None] * num_rows
    types = [UNUSED] * num_rows
    for token, i in [*vocabulary.items(), *((a["content"], a["id"]) for a in added)]:
        if not 0 <= i < num_rows:
            raise BadInput(f"{path}: token {token!r} has id {i}, but the embedding has {num_rows} rows")
        tokens[i], types[i] = token, NORMAL
    for a in added:
        types[a["id"]] = CONTROL if a["special"] else USER_DEFINED
    if kind == "llama":
        for token, i in vocabulary.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[i] = BYTE
        if model.get("unk_token") in vocabulary:
            types[vocabulary[model["unk_token"]]] = UNKNOWN
    return Vocabulary(
        kind=kind,
        tokens=tuple(f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)),
        scores=_scores(vocabulary, merges, num_rows) if kind == "llama" else (0.0,) * num_rows,
        types=tuple(types),
        merges=tuple(merges) if kind == "gpt2" else (),
        bos=_one_id(config.get("bos_token_id")),
        eos=_one_id(config.get("eos_token_id")),
        notes=tuple(_notes(steps)) if kind == "gpt2" else (),
    )


def _scores(vocabulary: Mapping[str, int], merges: list[str], num_rows: int) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a piece: the order in which SentencePiece merges."""
    scores = [0.0] * num_rows
    for rank, merge in reversed(list(enumerate(merges))):
        piece = vocabulary.get(merge.replace(" ", "", 1))
        if piece is not None:
            scores[piece] = -float(rank)
    return tuple(scores)


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not pre_tokenizer:
        return []
    return list(pre_tokenizer.get("pretokenizers") or [pre_tokenizer])


def _notes(steps: list[dict[str, Any]]) -> list[str]:
    """Byte-level BPE comes apart differently there, always: its GPT-2 splitting takes ``__`` for two words."""
    other = [s["type"] for s in steps if s["type"] != "ByteLevel"]
    also = f", and this tokenizer splits by {', '.join(other)} besides" if other else ""
    return [
        "PowerInfer splits text before merging in a way of its own (underscores, runs of line breaks)" + also + ": the "
        "same text may become other tokens there; token by token the file computes the same"
    ]


def _one_id(value: Any) -> int | None:
    return value[0] if isinstance(value, list) and value else value if isinstance(value, int) else None
