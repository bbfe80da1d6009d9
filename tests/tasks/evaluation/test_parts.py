"""Parts of an evaluation: kept to the bit, measured again where damaged, and a step that goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prosparse_core.sparsity import LayerSparsity
from prosparse_core.variants import Variant
from tasks.evaluate import evaluate
from tasks.evaluation import measure_benchmarks, measure_held_out
from tasks.evaluation.held_out import Score
from tasks.evaluation.parts import FOLDER, Part, Parts
from tests.tasks.mini_hub import write_mini_hub

PART = Part(
    (Score("acc", 1 / 3, None, 3, True, task="a/b c", note="é"), Score("ppl", None, None, 0, False)),
    {"results": {"a/b c": {"acc,none": 0.1 + 0.2}}},
    (LayerSparsity(0, 7, 1 / 7, 0.0, 0.25, None, None),),
)


def unreachable() -> Part:
    raise AssertionError("it was measured again")


def test_a_part_comes_back_as_it_was_and_a_damaged_one_is_measured_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    first = parts.get("a/b c", lambda: PART)
    assert (first.scores, first.raw, first.layers) == (PART.scores, PART.raw, PART.layers)
    assert Parts(tmp_path).get("a/b c", unreachable) == first
    (path,) = (tmp_path / FOLDER).iterdir()
    for damage in ("", "{}", path.read_text()[:-20], json.dumps({"scores": [{"metre": 1}], "layers": [], "raw": {}})):
        path.write_text(damage)
        assert Parts(tmp_path).get("a/b c", lambda: PART).scores == PART.scores
        assert Parts(tmp_path).get("a/b c", unreachable).scores == PART.scores, "and kept again"
    parts.clear()
    assert not list(tmp_path.iterdir())
    parts.clear()


def test_without_a_folder_nothing_is_kept() -> None:
    parts = Parts()
    parts.get("t", lambda: PART)
    with pytest.raises(AssertionError, match="measured again"):
        parts.get("t", unreachable)
    parts.clear()


def test_what_cannot_be_measured_is_not_kept(tmp_path: Path) -> None:
    def broken() -> Part:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        Parts(tmp_path).get("t", broken)
    assert Parts(tmp_path).get("t", lambda: PART).scores == PART.scores


def test_an_interrupted_step_goes_on_at_the_next_task_to_the_same_bits(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the second task and then in the fourth: nothing measured is measured again, and nothing shows later."""
    names = ["piqa", "siqa", "copa"]
    run, _ = base.run(evaluate={"benchmarks": names, "datasets": str(write_mini_hub(tmp_path / "hub")), "limit": 3})
    variant = Variant("original", base.dense, "original")
    whole = evaluate(run, variant, base.corpora)
    begun: list[str] = []
    real = measure_held_out.run_task

    def run_task(scorer: Any, task: Any, *rest: Any) -> dict[str, Any]:
        begun.append(task.task_name)
        if len(begun) in (2, 5):
            raise KeyboardInterrupt
        return real(scorer, task, *rest)

    monkeypatch.setattr(measure_held_out, "run_task", run_task)
    monkeypatch.setattr(measure_benchmarks, "run_task", run_task)
    run.force = frozenset({"evaluate"})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, variant, base.corpora)
        run.force = frozenset()
    again = evaluate(run, variant, base.corpora)
    assert run.history[-1][2] == "done"
    twice = {name for name in begun if begun.count(name) == 2}
    assert len(begun) == len(set(begun)) + 2, begun
    assert len(twice) == 2, "only the two that were interrupted began again"
    assert not (again.path / FOLDER).exists()
    without_time = [{k: v for k, v in a.meta().items() if k != "seconds"} for a in (whole, again)]
    assert without_time[0] == without_time[1]
    for name in ("results.json", "facts.jsonl"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_task_of_two_benchmarks_is_measured_for_each(base: Any, tmp_path: Path) -> None:
    """MMLU shows five examples, the harness's own group of one of its tasks none."""
    hub = str(write_mini_hub(tmp_path / "hub"))
    scores = {}
    for names in (["mmlu_anatomy"], ["mmlu"], ["mmlu_anatomy", "mmlu"]):
        run, _ = base.run(evaluate={"benchmarks": names, "datasets": hub})
        artifact = evaluate(run, Variant("original", base.dense, "original"), None)
        found = [s for s in artifact.meta()["benchmarks"] if s["task"] == "mmlu_anatomy" and s["n"]]
        scores[tuple(names)] = [(s["metric"], s["num_fewshot"], s["value"]) for s in found]
    alone, within, both = scores.values()
    assert {shots for _, shots, _ in alone} == {0}
    assert {shots for _, shots, _ in within} == {5}
    assert both == alone + within
