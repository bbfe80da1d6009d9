"""HumanEval and MBPP: the harness's prompts and stop strings, our own sandbox around what the model wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tasks.evaluation.benchmark_sandbox import Limits, Outcome, run_program

MBPP_EXAMPLES = (2, 3, 4)
"""task_id of the three examples in the prompt (MBPP's paper, section 3; in its ``prompt`` split)."""


class CodeRuns:
    """Runs programs one by one and remembers how they ended."""

    def __init__(self, run: Callable[[str, Limits], Outcome] = run_program, limits: Limits | None = None) -> None:
        self._run, self.limits = run, limits or Limits()
        self.ended: Counter[str] = Counter()
        self.isolation = "nothing was run"

    def passes(self, program: str) -> bool:
        """Whether a program runs to its end; counts what stopped it if not."""
        outcome = self._run(program, self.limits)
        self.isolation = outcome.isolation
        self.ended[outcome.reason.partition(":")[0]] += 1
        return outcome.passed

    @property
    def note(self) -> str:
        """How many ended how, and behind which walls."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.ended.most_common())
        return f"one greedy sample; {counts}; {self.limits.wall_s:g} s a program, {self.isolation}"


def code_settings(task: str, settings: dict[str, Any], runs: CodeRuns) -> dict[str, Any]:
    """The settings of lm-eval's ``humaneval`` or ``mbpp`` with the scoring replaced; nothing of theirs is imported."""
    kept = {k: v for k, v in settings.items() if k not in ("unsafe_code", "filter_list", "metric_list")}
    program = {"humaneval": humaneval_program, "mbpp": mbpp_program}[task]

    def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"pass@1": float(runs.passes(program(doc, results[0])))}

    changed: dict[str, Any] = {
        "process_results": process_results,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    }
    if task == "mbpp":
        changed["fewshot_config"] = {"sampler": "first_n", "split": "prompt", "process_docs": mbpp_examples}
    return {**kept, **changed}


def humaneval_program(doc: dict[str, Any], completion: str) -> str:
    """The function as the prompt began it, its tests, and the call that runs them."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: dict[str, Any], completion: str) -> str:
    """The model's code and the three tests its prompt showed."""
    return "\n".join([completion, *doc["test_list"][:3], ""])


def mbpp_examples(docs: Any) -> list[dict[str, Any]]:
    """The three examples, as few as there are."""
    by_id = {doc["task_id"]: doc for doc in docs}
    return [{**by_id[i], "is_fewshot": True} for i in MBPP_EXAMPLES if i in by_id]
