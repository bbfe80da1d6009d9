"""Looks at held-out text during training: right, as often as they may cost, and without a trace in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from short_stage import Notes, equal, held_out, lines, recipe, train

from prosparse_core import monitor
from prosparse_core.perplexity import measure
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.substitute import use_relu


def test_the_weights_and_the_log_are_the_same_with_and_without(tmp_path: Path) -> None:
    """Dropout draws random numbers in training, the regularizer counts, and neither sees the looks."""
    plain, log = train(tmp_path / "plain", dropout=0.4)
    watched, log_watched = train(
        tmp_path / "watched", held_out=held_out(), monitor_every=2, checkpoint_every_steps=3, dropout=0.4
    )
    assert equal(plain, watched)
    for a, b in zip(log, log_watched, strict=True):
        assert {k: a[k] for k in ("lm_loss", "l1", "sparsity")} == {k: b[k] for k in ("lm_loss", "l1", "sparsity")}
    seen = lines(tmp_path / "watched" / monitor.LOG)
    assert [(e["step"], e["corpus"]) for e in seen] == [(s, c) for s in range(2, 13, 2) for c in ("code", "prose")]


def test_it_sees_what_evaluation_sees(tmp_path: Path) -> None:
    model = tiny()
    use_relu(model)
    with L1Regularizer(model, L1Reduction()) as regularizer:
        eyes = monitor.Monitor(
            model, regularizer, held_out(), stage=2, precision="fp32", batch_size=2, path=tmp_path / monitor.LOG
        )
        found = eyes.look(7)
    assert lines(tmp_path / monitor.LOG) == [vars(one) for one in found]
    for one, (name, batch) in zip(found, held_out().items(), strict=True):
        wanted = measure(model, batch.tokens, batch.labels, batch.positions, precision="fp32")
        assert (one.stage, one.step, one.corpus, one.num_tokens) == (2, 7, name, wanted.num_tokens)
        assert one.lm_loss == pytest.approx(wanted.nll / wanted.num_tokens, rel=1e-6)
        assert one.sparsity == pytest.approx(wanted.sparsity, abs=1e-6)
    perplexity, sparsity = monitor.overall(found)
    total = sum(one.num_tokens for one in found)
    assert torch.tensor(perplexity).log() == pytest.approx(sum(o.lm_loss * o.num_tokens for o in found) / total)
    assert min(o.sparsity for o in found) <= sparsity <= max(o.sparsity for o in found)


def test_resumed_looks_are_those_of_an_uninterrupted_stage(tmp_path: Path) -> None:
    options: dict[str, Any] = {"held_out": held_out(), "monitor_every": 2, "checkpoint_every_steps": 3}
    train(tmp_path / "straight", **options)
    train(tmp_path / "broken", progress=Notes(8), **options)
    notes = Notes()
    train(tmp_path / "broken", progress=notes, **options)
    assert any("held-out perplexity" in note for note in notes.notes)
    assert lines(tmp_path / "broken" / monitor.LOG) == lines(tmp_path / "straight" / monitor.LOG)


@pytest.mark.parametrize(
    ("tokens", "processes", "steps", "every"),
    [
        (192, 1, 12, 100),  # a look costs a step
        (192, 8, 12, 800),
        (2, 1, 12, 2),
        (2, 1, 5000, 50),  # a hundred in all
    ],
)
def test_how_often_is_a_matter_of_cost(tokens: int, processes: int, steps: int, every: int) -> None:
    stages = [{"until_step": steps, "l1": 0}]
    assert monitor.every(recipe(stages=stages), tokens, processes) == every


def test_zero_is_never_and_nothing_to_look_at_is_nothing(tmp_path: Path) -> None:
    train(tmp_path / "off", held_out=held_out(), monitor_every=0)
    train(tmp_path / "blind", monitor_every=1)
    assert not list(tmp_path.rglob(monitor.LOG))
