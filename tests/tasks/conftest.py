"""A tiny dense model and a tiny mixture as artifacts, made by the real steps, for the tests of the steps after them."""

from __future__ import annotations

import argparse
import inspect
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prosparse_core.ledger import Ledger
from prosparse_core.recipe import Recipe, parse
from prosparse_core.store import Artifact
from tasks.base_model import base_model
from tasks.mixture import mixture
from tasks.step import Run

MODEL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}


@dataclass
class Seen:
    """A watcher that remembers what a step said."""

    notes: list[str] = field(default_factory=list)
    updates: list[tuple[float, float, dict[str, Any]]] = field(default_factory=list)

    @contextmanager
    def step(self, label: str) -> Iterator[Seen]:
        yield self

    def outcome(self, label: str, outcome: str, detail: str = "") -> None:
        pass

    def update(self, done: float, total: float, **fields: Any) -> None:
        self.updates.append((done, total, fields))

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Base:
    """What a test of a later step starts from."""

    home: Path
    recipe: dict[str, Any]
    dense: Artifact
    corpora: Artifact

    def run(self, **changes: Any) -> tuple[Run, Seen]:
        """A run of the recipe with some sections changed, and what it says."""
        return make_run(self.home, parse({**self.recipe, **changes}))


def make_run(home: Path, recipe: Recipe) -> tuple[Run, Seen]:
    """A run that writes into the ledger of ``home``, so that facts which do not fit its tables are refused."""
    ledger, seen, run_id = Ledger(home), Seen(), uuid.uuid4().hex
    ledger.start_run(
        run_id=run_id,
        flow="test",
        recipe=recipe.name,
        recipe_yaml=recipe.to_yaml(),
        overrides=[],
        model=recipe.model.id,
        provenance={},
    )
    return Run(recipe, home, run_id, ledger, seen), seen


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    home = tmp_path_factory.mktemp("home")
    sources = []
    for name, module in (("code", argparse), ("more", inspect)):
        lines = inspect.getsource(module).splitlines()
        (home / name).mkdir()
        for i in range(30):
            (home / name / f"{i}.txt").write_text("\n".join(lines[30 * i : 30 * i + 30]), encoding="utf-8")
        sources.append({"name": name, "kind": "files", "path": str(home / name), "weight": 1, "max_tokens": 4000})
    recipe: dict[str, Any] = {
        "name": "test",
        "description": "for tests",
        "model": {"id": "tiny", "source": "random:llama", "config": MODEL, "precision": "fp32"},
        "data": {
            "seq_len": 64,
            "sources": sources,
            "calibration_tokens": 128,
            "evaluation_tokens": 300,
            "choice_questions": 0,
        },
        "train": {"tokens_per_step": 64, "lr": 1e-3, "stages": [{"until_step": 1, "l1": 0}]},
    }
    run, _ = make_run(home, parse(recipe))
    dense = base_model(run)
    return Base(home, recipe, dense, mixture(run, dense))
