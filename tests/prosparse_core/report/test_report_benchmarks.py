"""The benchmarks page: what was measured alike beside each other, with errors, reasons and the commands behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from compare_runs import Comparison, write_comparison
from ledger_fixture import make_artifact, record_step, start_run

from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger
from prosparse_core.report import write_results

FOLDER = "/somewhere/on this machine/hub"
SHARED: dict[str, Any] = {"table": "evaluations", "higher_is_better": True, "dtype": "bf16", "batch_size": 8}


def write_evaluation(home: Path, setting: str, piqa: float, **changes: Any) -> str:
    """One run of the flow ``evaluate``: a benchmark, a group of which a task is n/a, and two that are not there."""
    ledger, run_id, variant = Ledger(home), f"run-{setting}-{len(changes)}", f"{setting}@1"
    limit = changes.pop("limit", 100)
    row = {**SHARED, "variant": variant, "n": 100, "limit": limit, "num_fewshot": 0, **changes}
    lost = {"metric": "acc_ppl", "value": None, "n": 0, "headline": True}
    rows = [
        {**row, "task": "piqa", "metric": "acc_ppl", "value": piqa, "stderr": 0.03, "headline": True},
        {**row, "task": "piqa", "metric": "acc", "value": 0.9, "headline": False},
        {**row, **lost, "task": "copa", "note": f"dataset aps/super_glue not found in {FOLDER}"},
        {**row, "task": "agieval_en", "metric": "acc_ppl", "value": 0.25, "stderr": 0.02, "headline": True, "n": 800},
        {**row, **lost, "task": "agieval_math", "note": f"dataset hails/agieval-math not found in {FOLDER}"},
    ]
    recipe = {
        "name": "evaluate",
        "model": {"id": "m", "precision": "bf16"},
        "evaluate": {
            "limit": limit, "batch_size": 8, "datasets": FOLDER, "run_code": True, "benchmarks": ["piqa", "copa"]
        },
    }  # fmt: skip
    facts = [{"table": "variants", "variant": variant, "model": "m", "setting": setting}, *rows]
    start_run(ledger, run_id, flow="evaluate", recipe="evaluate", model="m", recipe_yaml=yaml.safe_dump(recipe))
    record_step(ledger, run_id, make_artifact(home, "evaluate", f"{setting}-{len(changes)}", facts))
    ledger.end_run(run_id, status="done")
    return run_id


def test_two_models_beside_each_other(tmp_path: Path) -> None:
    runs = [write_evaluation(tmp_path, "prosparse", 0.55), write_evaluation(tmp_path, "original", 0.6)]
    folder = tmp_path / "docs"
    assert write_results(Ledger(tmp_path), runs, folder) == [folder / "benchmarks.md"]
    lines = (folder / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    error = f"± {100 * math.hypot(0.03, 0.03):.1f}"
    lost = "without agieval\\_math"
    assert lines[lines.index("## Scores") + 2 :][:12] == [
        "| Benchmark | Shots | Score | Original (original@1) | ProSparse (prosparse@1) | Difference (points) |",
        "| :--- | ---: | :--- | ---: | ---: | ---: |",
        f"| piqa, 100 documents | 0 | acc\\_ppl | 60.0 % ± 3.0 | 55.0 % ± 3.0 | −5.0 {error} |",
        "| copa | 0 |  | n/a \\[1\\] | n/a \\[1\\] | n/a \\[2\\] |",
        f"| agieval, 800 documents | 0 | acc\\_ppl | 25.0 % ± 2.0, {lost} | 25.0 % ± 2.0, {lost} | +0.0 ± 2.8 |",
        f"| mean: commonsense, 1 of 5 |  |  | 60.0 % ± 3.0 | 55.0 % ± 3.0 | −5.0 {error} |",
        "| mean: the seven columns |  |  | n/a \\[3\\] | n/a \\[3\\] | n/a \\[2\\] |",
        "",
        "1. copa: dataset aps/super\\_glue not found in DIR",
        "2. one of the two is missing",
        "3. the paper's average needs all of it: here code, reading, gsm8k, mmlu, bbh, agieval\\_math, copa, "
        "hellaswag, siqa, winogrande are missing",
        "",
    ]
    assert FOLDER not in "\n".join(lines)
    how = " --tasks piqa,copa --limit 100 --batch-size 8 --precision bf16 --run-code --datasets DIR"
    assert [line for line in lines if line.startswith("prosparse ")] == [
        f"prosparse evaluate prosparse@1{how}",
        f"prosparse evaluate original@1{how}",
        f"prosparse report {' '.join(runs)} --markdown docs",
    ]
    assert "| Evaluation: precision, batch size | bf16, 8 | bf16, 8 |" in lines
    assert any("the first 100 documents" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 4}, "batch_size is 8 in run-original-0, 4 in run-prosparse-1"),
        ({"dtype": "fp32"}, "dtype is bf16 in run-original-0, fp32 in run-prosparse-1"),
        ({"limit": None}, "limit is 100 in run-original-0, None in run-prosparse-1"),
    ],
)
def test_what_was_measured_otherwise_does_not_compare(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    runs = [write_evaluation(tmp_path, "original", 0.6), write_evaluation(tmp_path, "prosparse", 0.55, **change)]
    with pytest.raises(BadInput, match=said):
        write_results(Ledger(tmp_path), runs, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_results_page_has_the_benchmarks_of_its_evaluations(tmp_path: Path) -> None:
    """Beside a comparison; and a later benchmarks page leaves the figures of the results alone."""
    ledger, _ = write_comparison(tmp_path)
    measured = write_evaluation(tmp_path, "original", 0.6)
    page, *figures = write_results(ledger, [Comparison.run_id, measured], tmp_path / "docs")
    text = page.read_text(encoding="utf-8")
    assert "## Benchmarks" in text
    assert "| piqa, 100 documents | 0 | acc\\_ppl | 60.0 % ± 3.0 |" in text
    assert "prosparse evaluate original@1 --tasks piqa,copa" in text
    assert "The run of" not in text
    write_results(ledger, [measured], tmp_path / "docs")
    assert figures
    assert all(figure.exists() for figure in figures)
