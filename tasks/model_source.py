"""What can be known of ``model.source`` before its weights are read: its files, its tokenizer, whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.families import family_of
from prosparse_core.recipe import Model, Recipe
from prosparse_core.variants import check_folder
from tasks import base_model
from tasks.chain import require_chain

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""One file, or named in such a file with ``.index.json`` behind it."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
POSITIONS = ("max_position_embeddings", "n_positions")


def check_model(recipe: Recipe, activations: Sequence[str]) -> list[str]:
    """Refuse a model that the recipe's chain cannot be run on; returns what only a network could tell.

    Args:
        activations: what is going to be put into it.

    Raises:
        BadInput: see :func:`tasks.base_model.identity`; or a folder without weights or without a usable tokenizer, a
            chat template that chats of the recipe cannot be written by, windows longer than the model has positions.
        EnvironmentProblem: the package that carries the model is not installed.
    """
    model = recipe.model
    identity = base_model.identity(model)
    kind, _, rest = model.source.partition(":")
    if "hub" in identity:
        return [on_the_hub("model.source", model)]
    if kind == "package":
        base_model.gguf_of(rest)
    folder = Path(model.source).expanduser()
    if kind == "random":
        _check_config(recipe, {**model.config, "model_type": rest}, activations)
    elif folder.is_dir():
        _check_config(recipe, check_folder(folder, model.family), activations)
        _check_weights(folder)
        _check_tokenizer(recipe, folder)
    return []


def on_the_hub(key: str, model: Model) -> str:
    """The line that says that a model was not looked at."""
    revision = f" at {model.revision}" if model.revision else ""
    return f"{key}: {model.source}{revision} on the hub: its config, weights and tokenizer"


def _check_config(recipe: Recipe, config: Mapping[str, Any], activations: Sequence[str]) -> None:
    described = base_model.with_family(config, recipe.model)
    require_chain(recipe, described, activations)
    family = family_of(described)
    names = dict.fromkeys([*POSITIONS, *(family.named(dict.fromkeys(POSITIONS, 0)) if family else ())])
    positions = next((int(config[name]) for name in names if config.get(name)), None)
    if positions is not None and recipe.data.seq_len > positions:
        raise BadInput(
            f"data.seq_len={recipe.data.seq_len}: {recipe.model.source} has {positions} positions",
            hint=f"lower data.seq_len to {positions} or less",
        )


def _check_weights(folder: Path) -> None:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise BadInput(f"model.source: {index} is no index of weights: {error!r}") from error
            missing = [part for part in parts if not (folder / part).is_file()]
            if missing:
                raise BadInput(
                    f"model.source: {folder} lacks {len(missing)} of the {len(parts)} files of its weights, first "
                    f"{missing[0]}",
                    hint="copy the whole folder",
                )
            return
    raise BadInput(
        f"model.source: {folder} has no weights: neither {' nor '.join(WEIGHTS)}, nor an index of several files",
        hint="give a folder as save_pretrained writes it",
    )


def _check_tokenizer(recipe: Recipe, folder: Path) -> None:
    """transformers makes a tokenizer of three tokens for a folder without any: it must not come to that."""
    from transformers import AutoTokenizer

    from prosparse_core.data.documents import ASSISTANT, USER, Document, Turn, conversation
    from prosparse_core.data.packing import Encoder

    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadInput(
            f"model.source: {folder} has no tokenizer: none of {', '.join(TOKENIZERS)}",
            hint="copy the tokenizer's files there too",
        )
    trusted = recipe.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except ValueError as error:
        if not trusted and "trust_remote_code" in str(error):
            raise BadInput(base_model.untrusted(str(folder), "tokenizer"), hint=base_model.TRUST) from error
        raise BadInput(f"model.source: the tokenizer in {folder} cannot be read: {error}") from error
    except (OSError, ImportError) as error:
        raise BadInput(f"model.source: the tokenizer in {folder} cannot be read: {error}") from error
    encoder, sources = Encoder(tokenizer), recipe.data.sources
    if any(s.is_chat or s.kind == "code-instructions" for s in sources):
        encoder.encode([Document("chat", "chat", "An answer.", prompt="A question?")])
    if any(s.messages is not None for s in sources):
        encoder.encode([conversation("chat", "chat", [Turn(USER, "So?"), Turn(ASSISTANT, "It is.")] * 2)])
