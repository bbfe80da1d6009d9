"""A mirror laid out like the hub with a few rows of every benchmark's data, all of it made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

PIQA = [
    {"goal": "Open a door.", "sol1": "Turn the handle and push.", "sol2": "Paint it.", "label": 0},
    {"goal": "Dry a wet shirt.", "sol1": "Put it into water.", "sol2": "Hang it in the sun for a day.", "label": 1},
    {"goal": "Cut paper.", "sol1": "Use scissors.", "sol2": "Use a spoon.", "label": 0},
]
CODE = {
    "prompt": 'def one():\n    """Return 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
    "task_id": "Made/0",
}


def _mbpp(number: int) -> dict[str, Any]:
    tests = [f"assert f{number}({i}) == {i + number}" for i in range(3)]
    code = f"def f{number}(x):\r\n    return x + {number}"
    return {"task_id": number, "text": f"Write f{number} to add {number}.", "code": code, "test_list": tests}


def _question(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} and {number}?", "answer": f"Add them: {2 * number}.\n#### {2 * number}"}


def _choice(number: int) -> dict[str, Any]:
    return {"question": f"Which is {number}?", "choices": ["1", "2", "3", "4"], "answer": number % 4, "subject": "x"}


def _tydi(name: str) -> dict[str, Any]:
    answers = {"text": ["a stone"], "answer_start": [0]}
    return {"id": f"{name}-1", "title": "T", "context": "It is a stone.", "question": "What is it?", "answers": answers}


def _agieval(number: int) -> dict[str, Any]:
    return {"query": f"Q: pick {number}. A: Among (A) to (B), the answer is", "choices": ["(A)x", "(B)yy"], "gold": [0]}


DATA: dict[str, dict[str, dict[str, Rows]]] = {
    "baber/piqa": {"default": {"validation": PIQA}},
    "lighteval/siqa": {
        "default": {
            "validation": [
                {
                    "context": "A ran.",
                    "question": "Why?",
                    "answerA": "late",
                    "answerB": "wet",
                    "answerC": "red",
                    "label": "1",
                }
            ]
        }
    },
    "Rowan/hellaswag": {
        "default": {
            "validation": [
                {
                    "ctx_a": "A man sits.",
                    "ctx_b": "he",
                    "activity_label": "Sitting",
                    "endings": ["gets up.", "flies [title] off.", "is a chair.", "melts."],
                    "label": "0",
                }
            ]
        }
    },
    "allenai/winogrande": {
        "winogrande_xl": {
            "validation": [
                {"sentence": "The cup fell as _ was wet.", "option1": "cup", "option2": "table", "answer": "2"}
            ]
        }
    },
    "aps/super_glue": {
        "copa": {
            "validation": [
                {
                    "premise": "It rained.",
                    "question": "effect",
                    "choice1": "It got wet.",
                    "choice2": "It sang.",
                    "label": 0,
                }
            ]
        },
        "boolq": {"validation": [{"passage": "Ice is cold.", "question": "is ice cold", "label": 1}]},
    },
    "EleutherAI/lambada_openai": {"default": {"test": [{"text": "he took the hat and put on the hat"}]}},
    "google-research-datasets/tydiqa": {"secondary_task": {"validation": [_tydi("english"), _tydi("finnish")]}},
    "openai/gsm8k": {"main": {"train": [_question(i) for i in range(12)], "test": [_question(20), _question(30)]}},
    "cais/mmlu": {"anatomy": {"dev": [_choice(i) for i in range(5)], "test": [_choice(i) for i in range(6, 9)]}},
    "SaylorTwift/bbh": {
        name: {"test": [{"input": f"{name} is", "target": "True"}, {"input": "no", "target": "(A)"}]}
        for name in ("boolean_expressions", "navigate")
    },
    "hails/agieval-sat-en": {"default": {"test": [_agieval(1), _agieval(2)]}},
    "hails/agieval-math": {"default": {"test": [{"query": "Q: 1+1? A: The answer is", "answer": "2"}]}},
    "openai/openai_humaneval": {"openai_humaneval": {"test": [CODE]}},
    "google-research-datasets/mbpp": {
        "full": {"test": [_mbpp(11), _mbpp(12)], "prompt": [_mbpp(i) for i in range(1, 6)]}
    },
}


def write_mini_hub(folder: Path, data: dict[str, dict[str, dict[str, Rows]]] = DATA, *, readme: bool = True) -> Path:
    """Parquet files by dataset, configuration and split; ``readme``: with the block that says which is which."""
    for dataset, configs in data.items():
        root = folder / dataset
        lines = ["---", "configs:"]
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, rows in splits.items():
                path = root / config / f"{split}.parquet"
                write_parquet(path, rows)
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        if readme:
            (root / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder


def write_parquet(path: Path, rows: Rows) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(path))


def write_jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
