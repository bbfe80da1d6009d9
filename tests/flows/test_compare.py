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
from prosparse_core.schedule import l1_lambda, learning_rate

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
SHIFTED = ("vanilla_relu_fatrelu", "fixed_l1_fatrelu", "distilled_fatrelu", "closed_loop_fatrelu")
"""What thresholds make of every setting that runs ReLU, besides prosparse."""
TOKENS = 8 * 512
SHORT = (
    f"compare.settings=[{', '.join(SETTINGS)}]",
    "train.stages=[{until_step: 4, l1: 0}, {until_step: 5, l1: 0.1}, {until_step: 8, l1: 1.0, ramp: sine}]",
    "train.warmup_steps=2",
    "compare.distill={weight: 1.0, temperature: 2.0}",
    "compare.final_l1=[0.5, 1.0]",
    "compare.seeds={vanilla_relu: [7], fixed_l1: [7], prosparse_star: [7], prosparse: [7]}",
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
    assert {r["setting"] for r in rows} == {*SETTINGS, *SHIFTED} | untrained
    assert {r["tokens_seen"] for r in rows if r["setting"] not in untrained} == {TOKENS}
    for arm in ("fixed_l1", "fixed_l1_fatrelu", "prosparse_star", "prosparse"):
        told = sorted((r["seed"], r["l1"]) for r in rows if r["setting"] == arm)
        assert told == [(7, 0.5), (7, 1.0), (42, 0.5), (42, 1.0)]
    assert all(r["perplexity"] > 1 for r in rows)
    zeros = {r["setting"]: r["sparsity"] for r in rows}
    assert zeros["original"] < 0.01
    assert zeros["vanilla_relu"] < zeros["drelu"]
    assert zeros["relullama"] > 0.4
    zeros = {(r["setting"], r["l1"]): r["sparsity"] for r in rows if r["seed"] == 42}
    for after, before in (("prosparse", "prosparse_star"), ("fixed_l1_fatrelu", "fixed_l1")):
        assert zeros[after, 1.0] >= zeros[before, 1.0] - 1e-9
    assert len(result["settings"]) == len(rows)


def test_an_imported_checkpoint_is_another_model_and_in_the_comparison(compared: tuple[Path, dict[str, Any]]) -> None:
    home, _ = compared
    ledger = Ledger(home)
    rows = ledger.query("SELECT model, setting FROM comparison ORDER BY setting").records()
    models = {r["setting"]: r["model"] for r in rows}
    assert set(models) == {*SETTINGS, *SHIFTED, "relullama", "relullama_fatrelu"}
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
    # shifted_relu, drelu and the distilled one begin apart; all others of a seed share one stage 0
    assert counted["done"] == 3 + 2
    sql = "SELECT count(DISTINCT seed) FROM variants JOIN lineage ON artifact = checkpoint AND role = 'before' "
    assert {n for (n,) in Ledger(home).query(sql + "WHERE input_step = 'stage' GROUP BY input").rows} == {1}


def test_both_arms_stand_beside_each_other_with_how_lambda_went(compared: tuple[Path, dict[str, Any]]) -> None:
    home, _ = compared
    ledger = Ledger(home)
    matched = ledger.query("FROM matched_sparsity WHERE setting IN ('prosparse', 'prosparse_star')").records()
    told = {(r["with_thresholds"], r["measured"], r["l1"]) for r in matched}
    assert told == {(t, m, l1) for t in (False, True) for m in ("progressive", "fixed") for l1 in (0.5, 1.0)}
    assert all((r["reason"] is None) == (r["difference_pct"] is not None) for r in matched)
    assert all((r["no_interval"] is None) == (r["difference_low_pct"] is not None) for r in matched)
    arms = {(r["setting"], r["l1"]): r for r in ledger.query("FROM comparison").records()}
    train = recipes.load("tiny", [*SHORT]).train
    rates, lambdas = ([f(s) for s in range(1, 9)] for f in (
        lambda s: learning_rate(train, s), lambda s: l1_lambda(train.stages, s)))  # fmt: skip
    for setting, total, left in (("fixed_l1", 4.0, sum(rates[4:])), ("prosparse", sum(lambdas), rates[7])):
        row = arms[setting, 1.0]
        assert (row["num_steps"], row["regularized_steps"]) == (8, 4)
        assert (row["l1_sum"], row["lr_left"]) == (pytest.approx(total), pytest.approx(left / sum(rates[4:])))


def test_every_row_says_in_which_precision_its_weights_came(compared: tuple[Path, dict[str, Any]]) -> None:
    home, result = compared
    for view in ("variants", "leaderboard", "comparison", "results WHERE variant IS NOT NULL"):
        rows = Ledger(home).query(f"SELECT DISTINCT source_precision, model FROM {view}")
        assert set(rows.rows) == {("fp32 random", "tiny-random-llama"), ("fp32", "relullama")}, view
    assert result["model"] == "tiny-random-llama, fp32 random"


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
