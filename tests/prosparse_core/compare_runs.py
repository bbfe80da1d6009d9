"""A made-up comparison in a small ledger: many settings, factors and seeds that share stage 0, without any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ledger_fixture import make_artifact, start_run

from prosparse_core.ledger import Ledger
from prosparse_core.store import Artifact

MODEL = "example-model"
PRECISION = "Q4_1 dequantised"
CORPORA = {"code": 1000, "docs": 3000}
"""Held-out corpora and their tokens; their shares of the mixture are the same."""
TOKENS = 4096


@dataclass(frozen=True)
class Row:
    """A row that was trained and measured; perplexities by corpus in the order of ``CORPORA``."""

    setting: str
    perplexities: tuple[float, float]
    sparsity: float
    l1: float | None = None
    seed: int | None = 42
    stderr: float | None = 0.1
    accuracy: float | None = 0.5
    tokens: int = TOKENS


ROWS = (
    Row("original", (2.0, 4.0), 0.0, seed=None, tokens=0),
    Row("vanilla_relu", (2.2, 4.4), 0.60, 0.0),
    Row("fixed_l1", (2.4, 4.8), 0.80, 0.3),
    Row("fixed_l1", (2.5, 5.0), 0.82, 0.3, seed=1),
    Row("fixed_l1", (3.0, 6.0), 0.90, 0.8),
    Row("prosparse_star", (2.4, 4.9), 0.85, 1.0),
    Row("prosparse_star", (2.6, 5.1), 0.87, 1.0, seed=1),
    Row("closed_loop", (2.5, 4.9), 0.75, 0.21),
)


@dataclass
class Comparison:
    """What a made-up comparison measured; the defaults are an ordinary one."""

    run_id: str = "20260102T120000-example-compare-0002"
    rows: tuple[Row, ...] = ROWS
    settings: tuple[str, ...] = ("original", "vanilla_relu", "fixed_l1", "prosparse_star", "prosparse", "closed_loop")
    description: str = "Every setting, with numbers made up for a test"
    overrides: list[str] = field(default_factory=lambda: ["compare.fixed_l1=[0.3, 0.8]"])
    with_thresholds: bool = True


def write_comparison(home: Path, **changes: Any) -> tuple[Ledger, Comparison]:
    """A ledger under ``home`` with one finished comparison; ``changes`` are fields of :class:`Comparison`."""
    told = Comparison(**changes)
    ledger = Ledger(home)
    recipe = {
        "name": "example-compare",
        "description": told.description,
        "seed": 42,
        "model": {"id": MODEL},
        "data": {"sources": [{"name": c} for c in CORPORA]},
        "calibrate": {"max_ppl_increase_pct": 1.0},
        "compare": {"settings": list(told.settings), "imported": []},
    }
    with ledger.together():
        ledger.start_run(
            run_id=told.run_id,
            flow="compare",
            recipe="example-compare",
            recipe_yaml=yaml.safe_dump(recipe, sort_keys=False),
            overrides=told.overrides,
            model=MODEL,
            provenance={"host": "bench", "pid": 1},
        )
        dense = make_artifact(home, "base_model", "base model")
        shared = make_artifact(home, "stage", "stage 0", log=_log(0, 0.5, 0.0), inputs={"before": dense})
        _record(ledger, told.run_id, dense, "cached")
        _record(ledger, told.run_id, shared, stage=0)
        for row in told.rows:
            checkpoint = dense
            if row.tokens:
                name = f"stage 1 · {row.setting} {row.l1} {row.seed}"
                log = _log(1, row.sparsity, row.l1 or 0.0)
                checkpoint = make_artifact(
                    home, "stage", name, log=log, inputs={"before": shared}, config={"of": str(row)}
                )
                _record(ledger, told.run_id, checkpoint, stage=1)
            _evaluate(home, ledger, told.run_id, row, checkpoint, None)
            if told.with_thresholds and row.setting == "prosparse_star":
                _shift(home, ledger, told.run_id, row, checkpoint)
        ledger.end_run(told.run_id, "done")
    return ledger, told


def _record(ledger: Ledger, run_id: str, made: Artifact, status: str = "done", stage: int | None = None) -> None:
    step = ledger.start_step(run_id, step=made.step, stage=stage, label=made.label, fingerprint=str(made.fingerprint))
    ledger.record_artifact(made.path)
    ledger.end_step(step, status=status, artifact=made.digest)


def _shift(home: Path, ledger: Ledger, run_id: str, row: Row, checkpoint: Artifact) -> None:
    """Calibrate by both rules, then evaluate with the thresholds that were taken (those per layer)."""
    star = _variant(row, checkpoint, None)
    curve = [
        {
            "table": "thresholds",
            "variant": star["variant"],
            "rule": rule,
            "scope": scope,
            "threshold": t,
            "corpus": corpus,
            "num_tokens": 1000,
            "perplexity": 4.0 * (1 + cost * t),
            "sparsity": row.sparsity + t,
            "chosen": (rule, t) == ("cett", 0.02),
            "cett": t if rule == "cett" else None,
            "stopped_by": "budget" if rule == "grid" else "saturated",
        }
        for rule, scope, cost in (("grid", "global", 0.9), ("cett", "per_layer", 0.4))
        for t in (0.0, 0.01, 0.02, 0.04)
        for corpus in (*CORPORA, "mixed")
    ]
    name = f"calibrate {row.setting} {row.seed}"
    meta = {"threshold": 0.02, "max_ppl_increase_pct": 1.0}
    thresholds = make_artifact(home, "calibrate", name, [star, *curve], inputs={"checkpoint": checkpoint}, meta=meta)
    _record(ledger, run_id, thresholds)
    first, second = row.perplexities
    shifted = Row("prosparse", (1.01 * first, 1.01 * second), row.sparsity + 0.02, row.l1, row.seed)
    _evaluate(home, ledger, run_id, shifted, checkpoint, thresholds)


def _variant(row: Row, checkpoint: Artifact, thresholds: Artifact | None) -> dict[str, Any]:
    suffix = "" if thresholds is None else f"+{str(thresholds.digest)[:8]}"
    return {
        "table": "variants",
        "variant": f"{row.setting}@{str(checkpoint.digest)[:8]}{suffix}",
        "model": MODEL,
        "source_precision": PRECISION,
        "setting": row.setting,
        "activation": "original" if row.setting == "original" else "fatrelu" if thresholds else "relu",
        "checkpoint": checkpoint.digest,
        "thresholds": None if thresholds is None else thresholds.digest,
        "tokens_seen": row.tokens,
        "seed": row.seed,
        "l1": row.l1,
    }


def _evaluate(
    home: Path, ledger: Ledger, run_id: str, row: Row, checkpoint: Artifact, thresholds: Artifact | None
) -> None:
    facts = measured(row, _variant(row, checkpoint, thresholds))
    inputs = {"checkpoint": checkpoint, **({"thresholds": thresholds} if thresholds else {})}
    made = make_artifact(home, "evaluate", f"evaluate · {row.setting}", facts, inputs=inputs, config={"of": str(row)})
    _record(ledger, run_id, made)


def measured(row: Row, variant: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of the evaluation of one row."""
    same = {"table": "evaluations", "variant": variant["variant"], "num_fewshot": 0, "dtype": "fp32"}
    facts: list[dict[str, Any]] = [variant]
    for (corpus, n), value in zip(CORPORA.items(), row.perplexities, strict=True):
        score = {"metric": "token_perplexity", "value": value, "stderr": row.stderr, "n": n}
        score["share"] = n / sum(CORPORA.values())
        facts.append({**same, **score, "corpus": corpus, "higher_is_better": False})
        for layer, shift in enumerate((-0.01, 0.01)):
            zeros = row.sparsity + shift if row.sparsity else 0.0
            layer_fact = {"table": "sparsity", "variant": variant["variant"], "corpus": corpus, "layer": layer}
            threshold = 0.02 if variant["thresholds"] else None
            facts.append({**layer_fact, "num_tokens": n, "sparsity": zeros, "threshold": threshold})
    score = {"task": "function_choice", "metric": "acc", "value": row.accuracy, "stderr": 0.06, "n": 60}
    note = "no held-out code with a docstring" if row.accuracy is None else None
    return [*facts, {**same, **score, "higher_is_better": True, "headline": True, "note": note}]


def write_rows(ledger: Ledger, run_id: str, *rows: Row) -> None:
    """A run that measured these rows in one step, without training or thresholds: quick, for the views."""
    facts = []
    for number, row in enumerate(rows):
        about = {"setting": row.setting, "tokens_seen": row.tokens, "seed": row.seed, "l1": row.l1}
        variant = {
            "table": "variants",
            "variant": f"{row.setting}@{number}",
            "model": MODEL,
            "thresholds": None,
            **about,
        }
        facts += measured(row, variant)
    with ledger.together():
        start_run(ledger, run_id, flow="compare")
        _record(ledger, run_id, make_artifact(ledger.home, "evaluate", f"evaluate · {run_id}", facts))
        ledger.end_run(run_id, "done")


def _log(stage: int, sparsity: float, l1: float) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "step": step,
            "tokens": 512 * step,
            "l1_lambda": l1,
            "lr": 1e-4,
            "lm_loss": 3.0 - 0.1 * step,
            "l1_term": 0.1 * l1,
            "sparsity": 0.4 + (sparsity - 0.4) * step / 8,
            "tokens_per_s": 200.0,
        }
        for step in range(1 + 4 * stage, 5 + 4 * stage)
    ]
