"""TensorBoard's event files beside the ledger: every scalar once, also of a stage that was interrupted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from short_stage import STEPS, Notes, held_out, lines, train

from prosparse_core import monitor, tracking
from prosparse_core.errors import EnvironmentProblem
from prosparse_core.training_log import LOG

SCALARS = {
    f"train/{name}" for name in ("lm_loss", "l1", "l1_term", "l1_lambda", "lr", "sparsity", "grad_norm", "tokens_per_s")
} | {f"held_out/{corpus}/{name}" for corpus in ("code", "prose") for name in ("perplexity", "sparsity")}


def test_without_the_package_it_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracking.require(None)
    with pytest.raises(EnvironmentProblem, match=r"runtime.tracking=tensorboard, but the package") as caught:
        tracking.require("tensorboard")
    assert "prosparse[tracking]" in str(caught.value.hint)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of tensorboard's own imports
def test_every_scalar_is_there_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options: dict[str, Any] = {
        "held_out": held_out(),
        "monitor_every": 2,
        "checkpoint_every_steps": 4,
        "tracking": tmp_path / "events",
    }
    train(tmp_path / "stage", progress=Notes(7), **options)
    train(tmp_path / "stage", **options)
    found = scalars(tmp_path / "events")
    assert set(found) == SCALARS
    log = lines(tmp_path / "stage" / LOG)
    assert [step for step, _ in found["train/lm_loss"]] == list(range(2, STEPS + 1))
    for name in ("lm_loss", "l1_lambda", "sparsity"):
        wanted = [e[name] for e in log]
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx(wanted, rel=1e-6)
    looks = [e for e in lines(tmp_path / "stage" / monitor.LOG) if e["corpus"] == "code"]
    assert found["held_out/code/sparsity"] == [(e["step"], pytest.approx(e["sparsity"], rel=1e-6)) for e in looks]
