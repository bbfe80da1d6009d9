"""The suite on a tiny model and a made-up mirror: against plain torch, in every row, and with rows that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.recipe import Evaluate
from prosparse_core.variants import Variant
from tasks.evaluate import evaluate
from tasks.evaluation import benchmark_data, measure_benchmarks, scoring
from tasks.evaluation.benchmarks import BENCHMARKS, averages, plan_benchmarks
from tasks.evaluation.evaluation import Evaluation
from tasks.evaluation.held_out import Score
from tests.tasks.held_out_files import CONFIG, make_model
from tests.tasks.mini_hub import DATA, PIQA, write_mini_hub, write_parquet


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return make_model(tmp_path_factory.mktemp("tiny"))


def measured(
    tiny: tuple[Any, Any], hub: Path, *names: str, limit: int | None = None, batch_size: int = 2
) -> Evaluation:
    planned, datasets = plan_benchmarks(Evaluate(benchmarks=list(names), datasets=str(hub), run_code=True))
    how: dict[str, Any] = {"precision": "fp32", "batch_size": batch_size, "limit": limit}
    return measure_benchmarks.measure_benchmarks(*tiny, planned, datasets, **how)


def by_task(found: Evaluation) -> dict[tuple[str | None, str], Score]:
    return {(s.task, s.metric): s for s in found.scores}


def test_mmlu_s_letter_is_right_only_if_greedy_decoding_gives_it(
    tiny: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C, D and A are right: C is given, D only the likeliest letter where something else is given, B given for A."""
    answers = [
        *[(-3.0, False), (-2.0, False), (-0.1, True), (-4.0, False)],
        *[(-9.0, False), (-9.0, False), (-9.0, False), (-8.0, False)],
        *[(-2.0, False), (-0.1, True), (-3.0, False), (-4.0, False)],
    ]
    run_task = measure_benchmarks.run_task

    def run_with_answers(scorer: Any, *rest: Any) -> Any:
        def loglikelihood(requests: Any) -> Any:
            scorer.num_scored.update(dict.fromkeys((tuple(r.args) for r in requests), 1))
            return answers

        scorer.loglikelihood = loglikelihood
        return run_task(scorer, *rest)

    monkeypatch.setattr(measure_benchmarks, "run_task", run_with_answers)
    found = by_task(measured(tiny, hub, "mmlu"))
    names = ("mmlu_anatomy", "acc_greedy"), ("mmlu_anatomy", "acc"), ("mmlu", "acc_greedy"), ("mmlu", "acc,by_question")
    assert [found[name].value for name in names] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert [found[name].headline for name in names] == [True, False, True, False]
    assert found["mmlu_anatomy", "acc_greedy"].stderr == pytest.approx(1 / 3)
    assert found["mmlu_anatomy", "acc_ppl"].headline is False
    (column,) = [a for a in averages([vars(s) for s in found.values()]) if a.name == "mmlu"]
    assert column.value == pytest.approx(1 / 3)


def test_piqa_equals_plain_torch(tiny: tuple[Any, Any], hub: Path) -> None:
    model, tokenizer = tiny
    right = {"acc_ppl": 0, "acc": 0, "acc_norm": 0}
    for row in PIQA:
        head = [tokenizer.eos_token_id, *tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]]
        sums, means, norms = [], [], []
        for answer in (row["sol1"], row["sol2"]):
            ids = tokenizer(f"Question: {row['goal']}\nAnswer: {answer}")["input_ids"]
            whole = torch.tensor([[tokenizer.eos_token_id, *ids]])
            with torch.no_grad():
                logits = model(input_ids=whole[:, :-1]).logits[0, len(head) - 1 :].double()
            nll = torch.nn.functional.cross_entropy(logits, whole[0, len(head) :], reduction="sum")
            sums.append(-float(nll))
            means.append(-float(nll) / (whole.shape[1] - len(head)))
            norms.append(-float(nll) / len(answer))
        for name, values in (("acc_ppl", means), ("acc", sums), ("acc_norm", norms)):
            right[name] += values.index(max(values)) == row["label"]
    found = by_task(measured(tiny, hub, "piqa"))
    for name, count in right.items():
        assert found["piqa", name].value == pytest.approx(count / 3)
        p = count / 3
        assert found["piqa", name].stderr == pytest.approx(math.sqrt(p * (1 - p) / 2))
    assert found["piqa", "acc_ppl"].headline


def test_every_benchmark_of_the_paper_has_its_rows(tiny: tuple[Any, Any], hub: Path) -> None:
    found = measured(tiny, hub, "paper", limit=1)
    scores = by_task(found)
    for benchmark in BENCHMARKS:
        score = scores[benchmark.harness, benchmark.headline]
        assert score.headline
        assert score.value is not None
        assert 0 <= score.value <= 1
        assert score.num_fewshot == benchmark.num_fewshot
    partial = {task for (task, metric), s in scores.items() if s.partial and s.value is not None}
    assert {"piqa", "gsm8k", "mmlu_anatomy", "bbh_fewshot", "agieval_en", "mbpp"} <= partial
    assert not {"hellaswag", "winogrande", "copa", "boolq", "humaneval"} & partial, "they have one question"
    missing = {task: s.note for (task, _), s in scores.items() if s.value is None}
    assert missing["bbh_fewshot_snarks"] == f"dataset SaylorTwift/bbh has no configuration snarks in {hub}"
    assert len([task for task in missing if str(task).startswith("mmlu_")]) == 56
    assert scores["bbh_fewshot", "exact_match,strip"].note.startswith(
        "mean of 2 of 27 tasks: without bbh_fewshot_causal"
    )
    assert scores["agieval_en", "acc_ppl"].value == pytest.approx(
        (scores["agieval_sat_en", "acc_ppl"].value + scores["agieval_math", "acc"].value) / 2
    )
    assert "at most 48 tokens" not in scores["humaneval", "pass@1"].note
    assert "one greedy sample; 1 " in scores["humaneval", "pass@1"].note
    assert scores["lambada_openai", "perplexity"].higher_is_better is False
    assert scores["tydiqa_goldp_en", "exact_match"].note.endswith("among candidates this data does not have")
    assert set(found.seconds) == {b.name for b in BENCHMARKS}
    assert found.conditions["benchmark_max_length"] == CONFIG["max_position_embeddings"]
    assert json.dumps([s.value for s in found.scores], allow_nan=False)


def test_twice_the_same_examples_and_answers(tiny: tuple[Any, Any], hub: Path) -> None:
    first = measured(tiny, hub, "gsm8k", "bbh", "mmlu")
    again = measured(tiny, hub, "gsm8k", "bbh", "mmlu", batch_size=1)
    assert [(s.task, s.metric, s.value) for s in first.scores] == [(s.task, s.metric, s.value) for s in again.scores]


def test_the_space_before_an_answer_is_no_error(
    tiny: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made-up tasks have one answer "True" and one "(A)" each; the harness's own exact match finds none of them."""
    answer = tiny[1](" True", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        "tasks.evaluation.scoring.decode_greedily", lambda model, prompts, *a, **k: [answer] * len(prompts)
    )
    found = by_task(measured(tiny, hub, "bbh"))
    assert found["bbh_fewshot_navigate", "exact_match,strip"].value == 0.5
    assert found["bbh_fewshot_navigate", "exact_match"].value == 0.0
    assert (found["bbh_fewshot", "exact_match,strip"].value, found["bbh_fewshot", "exact_match,strip"].n) == (0.5, 4)
    assert found["bbh_fewshot", "exact_match,by_question"].value == 0.0
    assert [metric for (task, metric), s in found.items() if task == "bbh_fewshot" and s.headline] == [
        "exact_match,strip"
    ]


def test_any_task_of_the_harness_with_its_own_settings(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    choices = {"text": ["a stone", "a bird"], "label": ["A", "B"]}
    row = {"id": "1", "question": "What flies?", "choices": choices, "answerKey": "B"}
    hub = write_mini_hub(tmp_path, {"allenai/ai2_arc": {"ARC-Easy": {"test": [row]}}})
    found = by_task(measured(tiny, hub, "arc_easy"))
    assert [metric for _, metric in found] == ["acc_ppl", "acc", "acc_norm"]
    assert found["arc_easy", "acc"].headline


def test_data_that_do_not_fit_are_n_a_with_the_reason(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"question": "odd", "nothing": "else"}]
    few = {"main": {"train": DATA["openai/gsm8k"]["main"]["train"][:3], "test": DATA["openai/gsm8k"]["main"]["test"]}}
    hub = write_mini_hub(tmp_path, {"allenai/ai2_arc": {"ARC-Easy": {"test": rows}}, "openai/gsm8k": few})
    found = measured(tiny, hub, "arc_easy", "gsm8k")
    assert {s.value for s in found.scores} == {None}
    assert found.scores[0].note.startswith("dataset allenai/ai2_arc does not fit lm-eval's arc_easy: ")
    assert found.scores[1].note == "dataset openai/gsm8k has 3 examples, 8 are to be shown"


TYDI = DATA["google-research-datasets/tydiqa"]["secondary_task"]["validation"][0]
SAT = DATA["hails/agieval-sat-en"]["default"]["test"][0]


def only(dataset: str, config: str, split: str, *rows: dict[str, Any]) -> Any:
    return {dataset: {config: {split: list(rows)}}}


def piqa(*labels: Any) -> Any:
    rows = [{**row, "label": label} for row, label in zip(PIQA, labels, strict=False)]
    return only("baber/piqa", "default", "validation", *rows)


def sat(**columns: Any) -> Any:
    return only("hails/agieval-sat-en", "default", "test", SAT, {**SAT, **columns})


def changed(dataset: str, config: str, split: str, number: int, **columns: Any) -> Any:
    """The made-up data with a row of a split changed."""
    splits = DATA[dataset][config]
    rows = [{**row, **columns} if i == number else row for i, row in enumerate(splits[split])]
    return {dataset: {config: {**splits, split: rows}}}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("piqa", piqa("A", "B"), "row 0: its answer 'A' is not among its 2 choices"),
        ("piqa", piqa("0", "1"), "row 0: its answer '0' is not among its 2 choices"),
        ("piqa", piqa(1, -1), "row 1: its answer -1 is not among its 2 choices"),
        ("piqa", piqa(1, 0, 2), "row 2: its answer 2 is not among its 2 choices"),
        ("piqa", piqa(0, None), "row 1: its label is null"),
        ("piqa", piqa(0.0, 1.0), "row 0: TypeError: 'float' object cannot be interpreted as an integer"),
        (
            "agieval_sat_en",
            only("hails/agieval-sat-en", "default", "test", {**SAT, "gold": 0}),
            "row 0: TypeError: argument of type 'int' is not iterable",
        ),
        ("agieval_sat_en", sat(gold=[2]), "row 1: its answer [2] is not among its 2 choices"),
        ("agieval_sat_en", sat(choices=["(A)x", None]), "row 1: its choices holds null"),
        (
            "agieval_math",
            only("hails/agieval-math", "default", "test", {"query": "Q", "answer": ""}),
            "row 0: its answer is empty",
        ),
        (
            "lambada",
            only("EleutherAI/lambada_openai", "default", "test", {"text": "on the hat"}, {"text": None}),
            "row 1: its text is null",
        ),
        (
            "copa",
            changed("aps/super_glue", "copa", "validation", 0, label=-1),
            "row 0: its label is -1, not one of 0, 1",
        ),
        ("gsm8k", changed("openai/gsm8k", "main", "train", 3, answer=None), "example 3: its answer is null"),
        ("gsm8k", changed("openai/gsm8k", "main", "test", 1, answer=" "), "row 1: its answer is empty"),
        (
            "tydiqa",
            only(
                "google-research-datasets/tydiqa",
                "secondary_task",
                "validation",
                TYDI,
                {**TYDI, "answers": {"text": [], "answer_start": []}},
            ),
            "row 1: its answers is empty",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_n_a_before_the_model_reads_anything(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: Any, said: str
) -> None:
    """The harness gives 0 for most of these, without a word, and fails on others when all is answered."""
    monkeypatch.setattr(measure_benchmarks, "run_task", lambda *a: pytest.fail("the model was asked"))
    (score,) = measured(tiny, write_mini_hub(tmp_path, data), name).scores
    (dataset,) = data
    task = {b.name: b.harness for b in BENCHMARKS}.get(name, name)
    assert (score.task, score.value, score.headline) == (task, None, True)
    assert score.note == f"dataset {dataset} does not fit lm-eval's {task}: {said}"


def test_a_row_beyond_the_limit_need_not_fit(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    hub = write_mini_hub(tmp_path, piqa(1, -1))
    assert by_task(measured(tiny, hub, "piqa", limit=1))["piqa", "acc_ppl"].value in (0.0, 1.0)
    assert by_task(measured(tiny, hub, "piqa"))["piqa", "acc_ppl"].value is None


@pytest.mark.parametrize("name", ["fewshot_context", "construct_requests", "process_results"])
@pytest.mark.parametrize("error", [ValueError("odd\nrow"), RuntimeError("odd"), OSError("odd"), MemoryError("odd")])
def test_what_the_harness_makes_of_a_row_is_no_crash(
    tiny: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    load = measure_benchmarks.load_task

    def with_a_fault(settings: dict[str, Any]) -> Any:
        task = load(settings)
        function = getattr(task, name)

        def fail(*args: Any, **how: Any) -> Any:
            if PIQA[2]["goal"] in str((args, how)):
                raise error
            return function(*args, **how)

        setattr(task, name, fail)
        return task

    monkeypatch.setattr(measure_benchmarks, "load_task", with_a_fault)
    if isinstance(error, OSError | MemoryError):
        with pytest.raises(type(error), match="odd"):
            measured(tiny, hub, "piqa")
    else:
        (score,) = measured(tiny, hub, "piqa").scores
        assert score.note == f"dataset baber/piqa does not fit lm-eval's piqa: row 2: {type(error).__name__}: odd"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError("no more"), ProSparseError("nan")])
def test_what_the_model_raises_is_no_fault_of_the_data(
    tiny: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(scoring, "score_answers", fail)
    with pytest.raises(type(error), match=str(error)):
        measured(tiny, hub, "piqa")


def test_a_benchmark_of_which_nothing_can_be_had_is_one_row(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network every task is planned, and fails where its data are loaded: 57 of MMLU, 27 of BBH."""

    def refuse(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(benchmark_data, "_revision", lambda dataset: benchmark_data.OFFLINE)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    planned, datasets = plan_benchmarks(Evaluate(benchmarks=["mmlu", "bbh", "agieval", "piqa"]))
    assert [len(p.leaves) for p in planned] == [57, 27, 10, 1]
    found = measure_benchmarks.measure_benchmarks(*tiny, planned, datasets, precision="fp32", batch_size=2)
    assert [(s.task, s.metric, s.value, s.headline, s.note) for s in found.scores] == [
        (task, metric, None, True, f"dataset {dataset} not found in the hub: no route")
        for task, metric, dataset in (
            ("mmlu", "acc_greedy", "cais/mmlu"),
            ("bbh_fewshot", "exact_match,strip", "SaylorTwift/bbh"),
            ("agieval_en", "acc_ppl", "hails/agieval-aqua-rat"),
            ("piqa", "acc_ppl", "baber/piqa"),
        )
    ]


def test_a_limit_below_one_is_refused(tiny: tuple[Any, Any], hub: Path) -> None:
    with pytest.raises(BadInput, match="limit=0"):
        measured(tiny, hub, "piqa", limit=0)


def test_the_step_measures_corpora_and_benchmarks_and_knows_its_data(base: Any, tmp_path: Path) -> None:
    hub = write_mini_hub(tmp_path / "hub", {name: DATA[name] for name in ("baber/piqa", "lighteval/siqa")})
    section = {"batch_size": 3, "limit": 2, "benchmarks": ["commonsense"], "datasets": str(hub)}
    run, _ = base.run(evaluate=section)
    variant = Variant("original", base.dense, "original")
    artifact = evaluate(run, variant, base.corpora)
    lines = map(json.loads, (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines())
    rows = {(r["task"], r["metric"]): r for r in lines if r["table"] == "evaluations" and r["task"]}
    piqa = rows["piqa", "acc_ppl"]
    assert (piqa["limit"], piqa["batch_size"], piqa["dtype"], piqa["headline"]) == (2, 3, "fp32", True)
    assert rows["social_iqa", "acc"]["limit"] is None, "one question: nothing was cut"
    assert rows["hellaswag", "acc_ppl"]["note"] == f"dataset Rowan/hellaswag not found in {hub}"
    assert {"code", "more"} <= artifact.meta()["perplexity"].keys()
    board = run.ledger.query(
        f"SELECT commonsense, average, partial, not_measured FROM leaderboard WHERE run_id = '{run.run_id}'"
    ).records()
    assert board[0]["commonsense"] == pytest.approx((piqa["value"] + rows["social_iqa", "acc_ppl"]["value"]) / 2)
    assert board[0]["average"] is None
    assert board[0]["partial"] is True
    assert f"copa: dataset aps/super_glue not found in {hub}" in board[0]["not_measured"]

    alone = evaluate(run, variant, None)
    assert alone.meta()["perplexity"] == {}
    assert evaluate(run, variant, None).digest == alone.digest
    assert run.history[-1][2] == "cached"
    write_parquet(hub / "baber/piqa/default/validation.parquet", PIQA[:2])
    evaluate(run, variant, None)
    assert run.history[-1][2] == "done", "other data, another result"
    with pytest.raises(BadInput, match="runs code"):
        evaluate(base.run(evaluate={"benchmarks": ["mbpp"]})[0], variant, None)


def test_the_ledger_s_leaderboard_has_the_paper_s_averages(base: Any, hub: Path) -> None:
    section = {"batch_size": 3, "limit": 1, "benchmarks": ["paper"], "datasets": str(hub), "run_code": True}
    run, _ = base.run(evaluate=section)
    artifact = evaluate(run, Variant("original", base.dense, "original"), None)
    ours = {a.name: a.value for a in averages(artifact.meta()["benchmarks"])}
    assert [name for name, value in ours.items() if value is None] == ["average"], "2 of 27 tasks are not BBH"
    columns = ", ".join(ours)
    (board,) = run.ledger.query(f"SELECT {columns} FROM leaderboard WHERE run_id = '{run.run_id}'").records()
    assert board == pytest.approx(ours)
