"""Names become benchmarks before anything expensive; averages are the paper's; programs are judged in the sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prosparse_core.errors import BadInput
from prosparse_core.recipe import Evaluate
from tasks.evaluation.benchmark_code import CodeRuns, code_settings, humaneval_program, mbpp_examples, mbpp_program
from tasks.evaluation.benchmark_harness import find_leaves, known_names
from tasks.evaluation.benchmark_sandbox import Limits, Outcome
from tasks.evaluation.benchmarks import BENCHMARKS, GROUPS, averages, plan_benchmarks, resolve
from tests.tasks.mini_hub import CODE, DATA, write_mini_hub, write_parquet

PROSPARSE_7B = {
    "humaneval": 16.46,
    "mbpp": 22.38,
    "piqa": 75.68,
    "social_iqa": 43.55,
    "hellaswag": 71.09,
    "winogrande": 64.01,
    "copa": 77.0,
    "boolq": 62.51,
    "lambada_openai": 68.21,
    "tydiqa_goldp_en": 59.77,
    "gsm8k": 12.13,
    "mmlu": 45.48,
    "bbh_fewshot": 34.99,
    "agieval_en": 27.46,
}
"""Tables 1 and 3 of the paper."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_hub(tmp_path_factory.mktemp("hub"))


def test_the_paper_s_benchmarks_with_its_numbers_of_examples() -> None:
    assert {b.name: b.num_fewshot for b in BENCHMARKS} == {
        **dict.fromkeys(("humaneval", "piqa", "siqa", "hellaswag", "winogrande", "copa", "boolq", "lambada"), 0),
        **{"tydiqa": 0, "agieval": 0, "mbpp": 3, "gsm8k": 8, "mmlu": 5, "bbh": 3},
    }
    assert {name: [b.name for b in group] for name, group in GROUPS.items() if name != "paper"} == {
        "code": ["humaneval", "mbpp"],
        "commonsense": ["piqa", "siqa", "hellaswag", "winogrande", "copa"],
        "reading": ["boolq", "lambada", "tydiqa"],
    }
    assert [b.name for b in BENCHMARKS if b.runs_code] == ["humaneval", "mbpp"]


def test_every_entry_is_in_the_installed_harness() -> None:
    counts = {b.name: len(find_leaves(b.harness, b.folder)) for b in BENCHMARKS}
    assert counts == {**dict.fromkeys(counts, 1), "mmlu": 57, "bbh": 27, "agieval": 10}
    every = known_names()
    assert {b.harness for b in BENCHMARKS} <= every.keys()
    members = [leaf.task for leaf in find_leaves("pythia", every["pythia"])]
    assert {"arc_easy", "arc_challenge", "piqa"} <= set(members), "a group's member may be a tag of another folder"


def test_averages_are_those_of_the_paper() -> None:
    rows: list[dict[str, Any]] = [
        {"task": task, "value": value / 100, "headline": True} for task, value in PROSPARSE_7B.items()
    ]
    rows += [{"task": task, "value": 0.99, "headline": False} for task in PROSPARSE_7B]
    rows += [{"task": "mmlu_anatomy", "value": 0.99, "headline": True}]
    found = {a.name: round(100 * a.value, 2) for a in averages(rows) if a.value is not None}
    printed = {"code": 19.42, "commonsense": 66.27, "reading": 63.50, "gsm8k": 12.13, "mmlu": 45.48}
    assert found == {**printed, "bbh": 34.99, "agieval": 27.46, "average": 38.46}


def test_what_is_missing_makes_no_zero() -> None:
    rows = [
        {"task": t, "value": None if t == "mbpp" else 0.5, "headline": True} for t in PROSPARSE_7B if t != "bbh_fewshot"
    ]
    found = {a.name: (a.value, a.num_measured, a.num_benchmarks) for a in averages(rows)}
    assert found["code"] == (0.5, 1, 2)
    assert found["bbh"] == (None, 0, 1)
    assert found["average"] == (None, 6, 7)


def test_groups_come_first_and_no_benchmark_twice() -> None:
    found = resolve(["commonsense", "piqa", "gsm8k", "social_iqa", "arc_easy"])
    assert [(b.name, by_name) for b, by_name in found] == [
        ("piqa", True),
        ("siqa", True),
        ("hellaswag", False),
        ("winogrande", False),
        ("copa", False),
        ("gsm8k", True),
        ("arc_easy", True),
    ]
    assert found[-1][0].num_fewshot is None, "as the harness has it"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hellaswg", "did you mean hellaswag"),
        ("comonsense", "did you mean commonsense"),
        ("zzzzzz", "ours: paper, code"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, hint: str) -> None:
    with pytest.raises(BadInput, match=f"'{name}' is no benchmark") as caught:
        resolve(["piqa", name])
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_a_task_in_python_is_refused() -> None:
    with pytest.raises(BadInput, match="squadv2 is a task in Python"):
        plan_benchmarks(Evaluate(benchmarks=["squadv2"]))


def test_code_needs_the_opt_in(hub: Path) -> None:
    for name in ("humaneval", "mbpp"):
        with pytest.raises(BadInput, match=f"{name} runs code the model wrote") as caught:
            plan_benchmarks(Evaluate(benchmarks=["code", name], datasets=str(hub)))
        assert "--run-code" in str(caught.value.hint)
    planned, _ = plan_benchmarks(Evaluate(benchmarks=["code"], datasets=str(hub)))
    reason = "runs code the model wrote, which evaluate.run_code does not allow"
    assert [(p.leaves, p.absent) for p in planned] == [((), {"humaneval": reason}), ((), {"mbpp": reason})]
    allowed, _ = plan_benchmarks(Evaluate(benchmarks=["code"], datasets=str(hub), run_code=True))
    assert [(len(p.leaves), p.absent) for p in allowed] == [(1, {}), (1, {})]
    with pytest.raises(BadInput, match="runs code in this very process"):
        plan_benchmarks(Evaluate(benchmarks=["humaneval_plus"], datasets=str(hub), run_code=True))


def test_missing_data_are_absent_with_their_reason(hub: Path, tmp_path: Path) -> None:
    planned, _ = plan_benchmarks(Evaluate(benchmarks=["bbh", "agieval", "mmlu"], datasets=str(hub)))
    bbh, agieval, mmlu = planned
    assert [leaf.task for leaf in bbh.leaves] == ["bbh_fewshot_boolean_expressions", "bbh_fewshot_navigate"]
    assert bbh.absent["bbh_fewshot_snarks"] == f"dataset SaylorTwift/bbh has no configuration snarks in {hub}"
    assert len(bbh.absent) == 25
    assert [leaf.task for leaf in agieval.leaves] == ["agieval_math", "agieval_sat_en"]
    assert [leaf.task for leaf in mmlu.leaves] == ["mmlu_anatomy"]
    (nothing,), _ = plan_benchmarks(Evaluate(benchmarks=["mmlu"], datasets=str(tmp_path)))
    assert nothing.absent == {"mmlu": f"dataset cais/mmlu not found in {tmp_path}"}, "one row, not 57"


def test_a_wrong_schema_stops_it(tmp_path: Path) -> None:
    hub = write_mini_hub(tmp_path, {"baber/piqa": DATA["baber/piqa"]})
    write_parquet(hub / "baber/piqa/default/validation.parquet", [{"goal": "g", "sol1": "a", "label": 0}])
    with pytest.raises(BadInput, match=r"validation.parquet lacks the column sol2: it has goal, sol1, label"):
        plan_benchmarks(Evaluate(benchmarks=["paper"], datasets=str(hub)))


def test_the_identity_follows_data_and_settings(hub: Path, tmp_path: Path) -> None:
    there = write_mini_hub(tmp_path / "copy")
    section = Evaluate(benchmarks=["piqa", "bbh"], datasets=str(hub))
    first = [p.identity for p in plan_benchmarks(section)[0]]
    moved = section.model_copy(update={"datasets": str(there)})
    assert [p.identity for p in plan_benchmarks(moved)[0]] == first
    write_parquet(there / "SaylorTwift/bbh/navigate/test.parquet", [{"input": "other", "target": "x"}])
    changed = [p.identity for p in plan_benchmarks(moved)[0]]
    assert (changed[0], changed[1] == first[1]) == (first[0], False)
    (there / "baber/piqa/default/validation.parquet").unlink()
    assert plan_benchmarks(moved)[0][0].identity["absent"] == ["piqa"]


def test_only_what_was_measured_of_mmlu_by_another_rule_is_measured_again(hub: Path, tmp_path: Path) -> None:
    """The fingerprints of evaluations without it stay as they were when its letter began to be the generated one."""
    planned, _ = plan_benchmarks(Evaluate(benchmarks=["paper"], datasets=str(hub), run_code=True))
    before = {"benchmark", "num_fewshot", "max_new_tokens", "tasks", "absent"}
    assert {p.benchmark.name: p.identity.keys() - before for p in planned} == {
        **{b.name: set() for b in BENCHMARKS},
        "mmlu": {"headline"},
    }
    (nothing,), _ = plan_benchmarks(Evaluate(benchmarks=["mmlu"], datasets=str(tmp_path)))
    assert nothing.identity.keys() == before


def test_programs_are_put_together_and_judged() -> None:
    assert CodeRuns().passes(humaneval_program(CODE, CODE["canonical_solution"]))
    (row,) = [r for r in DATA["google-research-datasets/mbpp"]["full"]["test"] if r["task_id"] == 11]
    runs = CodeRuns()
    assert runs.passes(mbpp_program(row, row["code"]))
    assert not runs.passes(mbpp_program(row, "def f11(x):\n    return 0"))
    assert not runs.passes(mbpp_program(row, "import sys\nsys.exit()"))
    assert runs.note.startswith("one greedy sample; 1 passed, 1 AssertionError, 1 SystemExit; 10 s a program, ")


def test_mbpp_shows_the_examples_of_its_paper() -> None:
    shown = mbpp_examples(DATA["google-research-datasets/mbpp"]["full"]["prompt"][::-1])
    assert [(row["task_id"], row["is_fewshot"]) for row in shown] == [(2, True), (3, True), (4, True)]


def test_nothing_of_the_harness_s_code_is_kept() -> None:
    seen: list[str] = []

    def pretend(program: str, limits: Limits) -> Outcome:
        seen.append(program)
        return Outcome(True, "passed", "limits only")

    (leaf,) = find_leaves("humaneval", "humaneval")
    settings = code_settings("humaneval", dict(leaf.settings), CodeRuns(pretend))
    assert not {"unsafe_code", "filter_list"} & settings.keys()
    assert settings["generation_kwargs"]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert settings["process_results"](CODE, ["    return 2\n"]) == {"pass@1": 1.0}
    assert seen == [f"{CODE['prompt']}    return 2\n\n{CODE['test']}\ncheck(one)\n"]
