"""A small, whole home folder for tests: a store with the artifacts of real-looking runs, and their ledger."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prosparse_core.ledger import Ledger
from prosparse_core.store import FACTS, Artifact, Store, fingerprint

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
CORPORA = ("instruction", "package-docs", "python-code")
SHARES = (0.5, 0.3, 0.2)
"""Of the training mixture; the held-out tokens are as 1 to 2 to 3."""
NUM_LAYERS = 4
THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2)
CHOSEN = 0.15
FIRST_TIME = datetime(2026, 1, 1, 12, tzinfo=UTC)

Fact = dict[str, Any]


@dataclass
class Home:
    """A home folder, the runs in its ledger, and every artifact by label."""

    path: Path
    ledger: Ledger
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    first_run: str = "20260101T120000-smollm2-135m-aaaa"
    second_run: str = "20260102T120000-smollm2-135m-bbbb"
    """Everything from the store, except an evaluation of its own."""
    failed_run: str = "20260103T120000-smollm2-135m-cccc"


def make_artifact(
    home: Path,
    step: str,
    label: str,
    facts: list[Fact] | None = None,
    *,
    log: list[Fact] | None = None,
    logs: dict[str, list[Fact]] | None = None,
    inputs: dict[str, Artifact] | None = None,
    meta: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    created_at: datetime = FIRST_TIME,
) -> Artifact:
    """Commit an artifact to the store of ``home`` as a step does; nothing is recorded in the ledger."""
    inputs = inputs or {}
    payload = {
        "step": step,
        "version": 1,
        "config": {"label": label, **(config or {})},
        "inputs": {role: made.digest for role, made in inputs.items()},
        "seed": 42,
    }
    store = Store(home)
    work = store.work_folder(step, fingerprint(payload))
    work.mkdir(parents=True)
    (work / "result.txt").write_text(f"{label} {config}\n", encoding="utf-8")
    (work / FACTS).write_text("".join(json.dumps(fact) + "\n" for fact in facts or []), encoding="utf-8")
    for name, lines in {**({} if log is None else {"log.jsonl": log}), **(logs or {})}.items():
        (work / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    provenance = {
        "created_at": created_at.isoformat(timespec="seconds"),
        "host": "bench",
        "cpu": "Test CPU",
        "python": "3.11",
        "pid": 7,
        "wall_s": 12.5,
    }
    return store.commit(
        work, step=step, label=label, payload=payload, inputs=inputs, provenance=provenance, meta=meta or {}
    )


def start_run(ledger: Ledger, run_id: str, **changes: Any) -> str:
    """Begin a run with everything a run has."""
    given: dict[str, Any] = {
        "run_id": run_id,
        "flow": "prosparse",
        "recipe": MODEL,
        "recipe_yaml": f"name: {MODEL}\n",
        "overrides": ["train.lr=2e-4"],
        "model": MODEL,
        "provenance": {"host": "bench", "pid": 4242, "python": "3.11"},
    }
    ledger.start_run(**{**given, **changes})
    return run_id


def record_step(ledger: Ledger, run_id: str, artifact: Artifact, status: str = "done", stage: int | None = None) -> str:
    """A step of a run that made ``artifact`` or found it in the store."""
    with ledger.together():
        step_id = ledger.start_step(
            run_id, step=artifact.step, stage=stage, label=artifact.label, fingerprint=str(artifact.fingerprint)
        )
        ledger.record_artifact(artifact.path)
        ledger.end_step(step_id, status=status, artifact=artifact.digest)
    return step_id


def variant_fact(setting: str, checkpoint: Artifact, activation: str, thresholds: Artifact | None = None) -> Fact:
    """The line that describes a variant."""
    suffix = "" if thresholds is None else f"+{str(thresholds.digest)[:8]}"
    return {
        "table": "variants",
        "variant": f"{setting}@{str(checkpoint.digest)[:8]}{suffix}",
        "model": MODEL,
        "setting": setting,
        "activation": activation,
        "checkpoint": checkpoint.digest,
        "thresholds": None if thresholds is None else thresholds.digest,
        "tokens_seen": 0 if setting == "original" else 2048 * 3,
    }


def training_logs(stage: int, last: int) -> dict[str, list[Fact]]:
    """What a stage writes down beside a line a step: a look at held-out text, a skipped step, a checkpoint."""
    at = {"stage": stage, "step": last}
    looks = [{**at, "corpus": c, "num_tokens": 100, "lm_loss": 3.0 - 0.2 * stage, "sparsity": 0.6} for c in CORPORA]
    event = {**at, "action": "skip", "reason": "not finite: loss nan, gradient norm nan", "lm_loss": math.nan}
    write = {**at, "bytes": 1000, "blocking_s": 0.1, "write_s": 1.0}
    return {"held_out.jsonl": looks, "events.jsonl": [event], "checkpoints.jsonl": [write]}


def training_log(stage: int, first: int, last: int, l1_end: float) -> list[Fact]:
    """One line per optimizer step, as the training loop writes it."""
    return [
        {
            "stage": stage,
            "step": step,
            "tokens": 1024 * step,
            "l1_lambda": l1_end * (step - first + 1) / (last - first + 1),
            "lr": 1e-4,
            "lm_loss": 4.0 - 0.1 * step,
            "l1": 0.5,
            "l1_term": 0.5 * l1_end * (step - first + 1) / (last - first + 1),
            "mean_abs_x1": 0.1,
            "sparsity": 0.6 + 0.02 * step,
            "grad_norm": 1.5,
            "tokens_per_s": 140.0,
            "wall_s": 7.3,
        }
        for step in range(first, last + 1)
    ]


def evaluation_facts(
    variant: Fact, perplexity: float, sparsity: float, accuracy: float, threshold: float | None
) -> list[Fact]:
    """Perplexity and per-layer sparsity of every corpus, one benchmark with two metrics, one that could not be run."""
    name = variant["variant"]
    same = {"num_fewshot": 0, "batch_size": 4, "dtype": "fp32", "harness_version": "0.4.13"}
    facts = [variant]
    for i, corpus in enumerate(CORPORA):
        conditions = {**same, "corpus": corpus, "n": 1000 * (i + 1), "higher_is_better": False, "share": SHARES[i]}
        conditions |= {"window_tokens": 512, "num_documents": 20}
        for metric, value in (("token_perplexity", perplexity + i), ("byte_perplexity", 1.5 + 0.1 * i)):
            facts.append({"table": "evaluations", "variant": name, "metric": metric, "value": value, **conditions})
        for layer in range(NUM_LAYERS):
            facts.append(
                {
                    "table": "sparsity",
                    "variant": name,
                    "corpus": corpus,
                    "layer": layer,
                    "threshold": threshold,
                    "num_tokens": 1000 * (i + 1),
                    "sparsity": sparsity + 0.01 * i + 0.02 * (layer - 1.5),
                    "dead_frac": 0.01,
                    "mean_abs_x1": 0.05,
                    "mean_abs_live": None if layer == 3 else 0.1 * (1 - sparsity) * (layer + 1),
                    "chunk_sparsity": sparsity - 0.04,
                }
            )
    scores = {**same, "variant": name, "table": "evaluations", "higher_is_better": True, "n": 60}
    facts += [
        {**scores, "task": "piqa", "metric": "acc", "value": accuracy, "stderr": 0.03},
        {**scores, "task": "piqa", "metric": "acc_norm", "value": accuracy + 0.05, "stderr": 0.03},
        {**scores, "task": "docstrings", "metric": "acc", "value": accuracy + 0.1, "stderr": 0.03, "headline": True},
        {
            **scores,
            "task": "gsm8k",
            "metric": "exact_match",
            "value": None,
            "n": 0,
            "note": "no network, no local copy",
        },
    ]
    return facts


def threshold_facts(variant: Fact) -> list[Fact]:
    """A calibration curve on every corpus and on all of them."""
    return [
        {
            "table": "thresholds",
            "variant": variant["variant"],
            "rule": "grid",
            "scope": "global",
            "threshold": t,
            "corpus": corpus,
            "num_tokens": 1000,
            "perplexity": 10.0 * math.exp(t * t),
            "sparsity": 0.7 + 0.8 * t,
            "chosen": t == CHOSEN,
        }
        for corpus in (*CORPORA, "mixed")
        for t in THRESHOLDS
    ]


def speed_facts(variant: Fact) -> list[Fact]:
    """Dense baseline and sparse kernel under equal conditions; a kernel that failed its gate; one without a partner."""
    same = {
        "table": "speed",
        "variant": variant["variant"],
        "d_model": 576,
        "d_ff": 1536,
        "num_tokens": 1,
        "dtype": "fp32",
        "sparsity": 0.82,
        "mask_source": "recorded",
        "threads": 1,
        "timer": "wall",
        "num_reps": 100,
        "host": "bench",
        "cpu": "Test CPU",
        "device": "cpu",
        "byte_ratio": 5.5,
    }
    times = {
        "torch": (190.0, 200.0, 210.0),
        "native_dense": (115.0, 120.0, 125.0),
        "native": (45.0, 50.0, 55.0),
        "triton": (4.0, 5.0, 6.0),
    }
    facts = [
        {**same, "kernel": kernel, "provider": provider, "p20_us": low, "p50_us": mid, "p80_us": high}
        | {"gate_passed": provider != "triton", "rel_err": 1e-7, "gbps": 1e-3 * 3538944 / mid}
        for kernel in ("s2", "s3")
        for provider, (low, mid, high) in times.items()
    ]
    lone = {**same, "kernel": "s2", "provider": "native", "threads": 2, "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0}
    return [variant, *facts, {**lone, "gate_passed": True, "rel_err": 1e-7}]


def predictor_facts(variant: Fact) -> list[Fact]:
    """Recall and predicted sparsity of every layer at two cutoffs."""
    return [variant] + [
        {
            "table": "predictors",
            "variant": variant["variant"],
            "layer": layer,
            "cutoff": cutoff,
            "hidden": 128,
            "label_rule": "x1 != 0",
            "recall": 0.95 - 0.2 * cutoff + 0.01 * layer,
            "predicted_sparsity": 0.6 + 0.2 * cutoff,
            "true_sparsity": 0.82,
            "num_tokens": 4096,
        }
        for layer in range(NUM_LAYERS)
        for cutoff in (0.25, 0.5)
    ]


def build_home(path: Path) -> Home:
    """Three runs: one that made everything, one that found all but an evaluation in the store, one that failed."""
    home = Home(path, Ledger(path))
    made = home.artifacts

    def make(step: str, label: str, facts: list[Fact] | None = None, **more: Any) -> Artifact:
        when = FIRST_TIME + timedelta(minutes=len(made))
        made[label] = make_artifact(path, step, label, facts, created_at=when, **more)
        return made[label]

    base = make("base_model", "base model")
    data = make("mixture", "mixture", inputs={"model": base})
    original = variant_fact("original", base, "original")
    cliff = {"table": "evaluations", "variant": original["variant"], "task": "calibration/python-code", "n": 500}
    cliff |= {"corpus": "python-code", "metric": "token_perplexity", "value": 5.5, "higher_is_better": False}
    make("substitute", "substitute", [original, cliff], inputs={"checkpoint": base, "mixture": data})
    checkpoint = base
    for stage, (first, last, l1) in enumerate([(1, 3, 0.0), (4, 5, 0.1), (6, 8, 0.4)]):
        inputs = {"before": checkpoint, "corpora": data}
        log, logs = training_log(stage, first, last, l1), training_logs(stage, last)
        checkpoint = make("stage", f"stage {stage}", log=log, logs=logs, inputs=inputs)
    Store(path).drop(made["stage 0"], "result.txt", "runtime.keep=last")
    star = variant_fact("prosparse_star", checkpoint, "relu")
    calibration = [star, *threshold_facts(star)]
    thresholds = make("calibrate", "calibrate", calibration, inputs={"checkpoint": checkpoint, "mixture": data})
    full = variant_fact("prosparse", checkpoint, "fatrelu", thresholds)
    for variant, numbers in (
        (original, (6.4, 0.0, 0.6, None)),
        (star, (7.0, 0.75, 0.55, 0.0)),
        (full, (7.1, 0.83, 0.54, CHOSEN)),
    ):
        numbers = (numbers[0], max(numbers[1], 0.05), *numbers[2:])
        facts = evaluation_facts(variant, *numbers)
        make("evaluate", f"evaluate · {variant['setting']}", facts, inputs={"checkpoint": checkpoint, "corpora": data})
    make("predictor", "predictor", predictor_facts(full), inputs={"checkpoint": checkpoint, "thresholds": thresholds})
    decode = {"table": "speed", "variant": full["variant"], "kernel": "decode", "provider": "native_certified"}
    decode |= {"dtype": "fp32", "timer": "wall", "mask_source": "recorded", "p50_us": 9e3, "gate_passed": True}
    make("speed", "speed", [*speed_facts(full), decode], inputs={"checkpoint": checkpoint, "thresholds": thresholds})
    make("export", "export", inputs={"checkpoint": checkpoint, "thresholds": thresholds})

    start_run(home.ledger, home.first_run)
    for label, artifact in made.items():
        stage = int(label[-1]) if artifact.step == "stage" else None
        record_step(home.ledger, home.first_run, artifact, stage=stage)
    home.ledger.end_run(home.first_run, "done")

    again = evaluation_facts(full, 7.3, 0.83, 0.5, CHOSEN)
    again = [{**fact, "limit": 10} if fact.get("task") else fact for fact in again]
    own = "evaluate · prosparse (10 documents)"
    when = FIRST_TIME + timedelta(days=1)
    made[own] = make_artifact(path, "evaluate", own, again, inputs={"checkpoint": checkpoint}, created_at=when)
    start_run(home.ledger, home.second_run)
    for label, artifact in made.items():
        if label not in ("evaluate · prosparse", "speed"):
            record_step(home.ledger, home.second_run, artifact, "done" if label == own else "cached")
    home.ledger.end_run(home.second_run, "done")

    start_run(home.ledger, home.failed_run)
    record_step(home.ledger, home.failed_run, base, "cached")
    step = home.ledger.start_step(home.failed_run, step="stage", stage=0, label="stage 0", fingerprint="f" * 64)
    home.ledger.end_step(
        step, status="failed", error="ProSparseError: stage 0, step 2: loss nan", hint="lower train.lr"
    )
    home.ledger.end_run(home.failed_run, "failed", "ProSparseError: stage 0, step 2: loss nan")
    return home


def ask(source: Home | Ledger, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    return (source.ledger if isinstance(source, Home) else source).query(sql).rows


_shared: list[Home] = []


def shared_home(factory: Any) -> Home:
    """The one filled home of a test session, for tests that only read; ``factory`` is pytest's tmp_path_factory."""
    if not _shared:
        _shared.append(build_home(factory.mktemp("shared") / "home"))
    return _shared[0]


VARIANT = {"table": "variants", "variant": "v", "model": "m", "setting": "prosparse"}
SCORE = {"table": "evaluations", "variant": "v", "task": "piqa", "metric": "acc", "value": 0.5}


def small_ledger(path: Path) -> Ledger:
    """A ledger with one finished run of one evaluation with one score."""
    ledger = Ledger(path)
    start_run(ledger, "first")
    record_step(ledger, "first", make_artifact(path, "evaluate", "e", [VARIANT, SCORE]))
    ledger.end_run("first", "done")
    return ledger


def assert_whole(ledger: Ledger, *more: str) -> None:
    """The run and the fact of :func:`small_ledger` are there, and the runs of ``more``."""
    assert [row[0] for row in ask(ledger, "SELECT run_id FROM runs ORDER BY started_at")] == ["first", *more]
    assert ask(ledger, "SELECT value, run_id FROM results") == [(0.5, "first")]


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python program in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def private(ledger: Ledger) -> Path:
    """The database that only writers open."""
    return ledger.home / ".ledger" / "private.duckdb"
