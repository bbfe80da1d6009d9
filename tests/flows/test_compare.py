"""Every setting on ``tiny`` through the command line: equal tokens, shared stage 0, and all of it in the ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prosparse_core import recipe as recipes
from prosparse_core.ledger import Ledger
from prosparse_core.random_model import build_random
from prosparse_core.report import collect, tables_compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = (
    "original",
    "vanilla_relu",
    "shifted_relu",
    "fixed_l1",
    "prosparse_star",
    "prosparse",
    "drelu",
    "distilled",
    "closed_loop",
)
TOKENS = 8 * 512
SHORT = (
    f"compare.settings=[{', '.join(SETTINGS)}]",
    "train.stages=[{until_step: 4, l1: 0}, {until_step: 5, l1: 0.1}, {until_step: 8, l1: 1.0, ramp: sine}]",
    "train.warmup_steps=2",
    "compare.distill={weight: 1.0, temperature: 2.0}",
    "compare.seeds={prosparse: [7]}",
    "calibrate.thresholds=[0.0, 0.05]",
    "calibrate.refine=1",
    "evaluate.choice=false",
    "data.evaluation_tokens=512",
    "data.calibration_tokens=512",
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("home")
    config = {**recipes.load("tiny").model.config, "hidden_act": "relu"}
    build_random("llama", config, 5, home / "relullama")
    imported = f"compare.imported=[{{setting: relullama, source: {home / 'relullama'}}}]"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    overrides = [part for override in (*SHORT, imported) for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "compare", "tiny", "--json", *overrides],
        cwd=home,
        env={**environment, "PROSPARSE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home, json.loads(done.stdout)


def test_every_setting_is_measured_under_equal_tokens(compared: tuple[Path, dict[str, Any]]) -> None:
    home, result = compared
    rows = (
        Ledger(home)
        .query("SELECT setting, tokens_seen, seed, l1, sparsity, perplexity FROM leaderboard WHERE perplexity > 0")
        .records()
    )
    untrained = {"original", "relullama", "relullama_fatrelu"}
    assert {r["setting"] for r in rows} == set(SETTINGS) | untrained
    assert {r["tokens_seen"] for r in rows if r["setting"] not in untrained} == {TOKENS}
    assert sorted(r["seed"] for r in rows if r["setting"] == "prosparse") == [7, 42]
    assert {r["l1"] for r in rows if r["setting"] in ("fixed_l1", "prosparse")} == {1.0}
    assert all(r["perplexity"] > 1 for r in rows)
    zeros = {r["setting"]: r["sparsity"] for r in rows}
    assert zeros["original"] < 0.01
    assert zeros["vanilla_relu"] < zeros["drelu"]
    assert zeros["relullama"] > 0.4
    zeros = {r["setting"]: r["sparsity"] for r in rows if r["seed"] == 42}
    assert zeros["prosparse"] >= zeros["prosparse_star"] - 1e-9
    assert len(result["settings"]) == len(rows)


def test_an_imported_checkpoint_is_another_model_and_in_the_comparison(compared: tuple[Path, dict[str, Any]]) -> None:
    home, _ = compared
    ledger = Ledger(home)
    rows = ledger.query("SELECT model, setting FROM comparison ORDER BY setting").records()
    models = {r["setting"]: r["model"] for r in rows}
    assert set(models) == {*SETTINGS, "relullama", "relullama_fatrelu"}
    assert {s for s, model in models.items() if model == "relullama"} == {"relullama", "relullama_fatrelu"}
    assert set(models.values()) == {"relullama", "tiny-random-llama"}
    (run,) = ledger.query("SELECT run_id FROM runs").records()
    names = {str(row[0].text) for row in tables_compare.comparison(collect(ledger, run["run_id"])).rows}
    assert {"relullama", "relullama_fatrelu"} <= names
    steps = [r["step"] for r in ledger.query("SELECT step FROM steps ORDER BY started_at, step_id").records()]
    assert steps[:2] == ["base_model", "base_model"], "before anything is trained"


def test_what_settings_have_in_common_is_trained_once(compared: tuple[Path, dict[str, Any]]) -> None:
    home, _ = compared
    stages_0 = Ledger(home).query(
        "SELECT status, count(*) AS n FROM steps WHERE step = 'stage' AND stage = 0 GROUP BY 1"
    )
    counted = {r["status"]: r["n"] for r in stages_0.records()}
    # shifted_relu, drelu and the distilled one begin apart; all others share one stage 0
    assert counted == {"done": 4, "cached": 5}


def test_a_checkpoint_with_an_activation_transformers_lacks_refuses_a_plain_reload(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    from transformers import AutoModelForCausalLM

    home, _ = compared
    configs = {p.parent: json.loads(p.read_text())["hidden_act"] for p in home.glob("store/stage/*/model/config.json")}
    assert set(configs.values()) == {"relu", "prosparse_shifted_relu", "prosparse_drelu"}
    for folder, activation in configs.items():
        if activation.startswith("prosparse_"):
            with pytest.raises(KeyError):
                AutoModelForCausalLM.from_pretrained(folder)
