"""Held-out files as a mixture leaves them, and a tiny model to measure on them, for the tests of evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prosparse_core.random_model import build_random
from prosparse_core.variants import MODEL, load_model

CONTEXT = 96
WINDOW = 64
"""Tokens of a window of the held-out files below, as of one in training."""
CONFIG = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Far from uniform, so that a wrong window or a wrong prefix shows in every number.
    "initializer_range": 0.3,
}
TEXTS = {
    "code": [
        "import os\n\n\ndef first(values):\n    return values[0]\n",
        "class Stack:\n" + "".join(f"    def push_{i}(self, x):\n        self.items.append(x)\n" for i in range(9)),
        "x = 1\n",
    ],
    "docs": ["A list is a sequence.\n", "Ünïcode and 汉字 are text, too.\n"],
}
PROMPTS = {
    "chat": [
        ("Write the function `f`.", "def f(x):\n    return x\n"),
        ("Say it at length.", "def g(x):\n" + "    print(x, end='')\n" * 30),
        ("Indent.", "    return None"),
    ]
}
QUESTIONS = [
    ('def one():\n    """Return one."""\n', ["    return 1", "    return 2", "    raise OSError", "    pass"], 0),
    ('def two(a):\n    """Return a\'s end."""\n', ["    return a[0]", "    return a[-1]", "    del a", "    a()"], 1),
    ('def three():\n    """Do nothing."""\n', ["    return 1", "    exit()", "    pass", "    assert 0"], 2),
]


def write_held_out(folder: Path, *, choices: bool = True, seq_len: int = WINDOW) -> Path:
    """Two corpora of text, one of instructions, and (``choices``) the questions."""
    (folder / "evaluation").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [{"id": str(i), "file": f"{i}.py", "text": text, "num_tokens": 1} for i, text in enumerate(texts)]
        for name, texts in TEXTS.items()
    }
    for name, pairs in PROMPTS.items():
        rows[name] = [{"id": str(i), "file": "x", "text": a, "prompt": p} for i, (p, a) in enumerate(pairs)]
    names = list(rows)
    if choices:
        rows["choices"] = [
            {"id": str(i), "file": "x", "question": q, "choices": c, "answer": a}
            for i, (q, c, a) in enumerate(QUESTIONS)
        ]
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "evaluation" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    manifest = {"seq_len": seq_len, "corpora": [{"name": name} for name in names]}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def make_model(folder: Path) -> tuple[Any, Any]:
    """A random LLaMA and its tokenizer, which does not put its BOS <|im_start|> before a text: <|im_end|> separates."""
    build_random("llama", CONFIG, 3, folder / MODEL)
    return load_model(folder / MODEL)
