"""Small ledgers for the report's tests: runs with plausible numbers, made of real artifacts, without any model."""

from __future__ import annotations

import contextlib
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prosparse_core.ledger import Ledger
from prosparse_core.store import Artifact, Store, fingerprint

SETTINGS = (("original", "original"), ("vanilla_relu", "relu"), ("prosparse_star", "relu"), ("prosparse", "fatrelu"))
MACHINE = {
    "created_at": "2026-01-01T12:34:56+00:00",
    "host": "bench-1",
    "cpu": "Example CPU 9000",
    "cores": 2,
    "threads": 1,
    "python": "3.11.9",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "lm_eval": "0.4.13",
    "wall_s": 61.5,
}


@dataclass
class Story:
    """What happens in a made-up run; the defaults are an ordinary one that reaches its end."""

    run_id: str = "20260101T120000-example-0001"
    recipe: str = "example"
    description: str = "A small model on three corpora, with numbers made up for a test"
    corpora: list[str] = field(default_factory=lambda: ["python-code", "package-docs", "code-instructions"])
    num_layers: int = 30
    until: str | None = None
    """The last step that is done."""
    fails_at: str | None = None
    error: str = "ProSparseError: the loss is not finite at step 93"
    is_ended: bool = True
    has_stderr: bool = True
    gates_pass: bool = True
    stages: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"until_step": 60, "l1": 0.0},
            {"until_step": 80, "l1": 0.1},
            {"until_step": 200, "l1": 0.5, "ramp": "sine"},
            {"until_step": 340, "l1": 1.0, "ramp": "sine"},
        ]
    )
    cached: tuple[str, ...] = ("base_model", "mixture")
    steps_logged_every: int = 1


class _Stopped(Exception):
    pass


class Scribe:
    """Writes a story down the way a run does: step by step, artifact by artifact."""

    def __init__(self, home: Path, story: Story) -> None:
        self.home, self.story = home, story
        self.ledger, self.store = Ledger(home), Store(home)
        self.random = random.Random(story.run_id)
        self.made: dict[str, Artifact] = {}

    def write(self) -> Ledger:
        story = self.story
        recipe = {
            "name": story.recipe,
            "description": story.description,
            "seed": 42,
            "model": {"id": "example-model"},
            "data": {"seq_len": 256, "sources": [{"name": c, "kind": "files", "weight": 1.0} for c in story.corpora]},
            "train": {"tokens_per_step": 512, "lr": 3e-4, "stages": story.stages},
            "calibrate": {"max_ppl_increase_pct": 1.0},
        }
        with self.ledger.together():
            self._tell(story, recipe)
        return self.ledger

    def _tell(self, story: Story, recipe: dict[str, Any]) -> None:
        self.ledger.start_run(
            run_id=story.run_id,
            flow="prosparse",
            recipe=story.recipe,
            overrides=[],
            model="example-model",
            recipe_yaml=yaml.safe_dump(recipe, sort_keys=False),
            provenance={**MACHINE, "pid": 4711},
        )
        with contextlib.suppress(_Stopped):
            self._chain()
        if story.is_ended:
            failed = story.fails_at is not None
            self.ledger.end_run(story.run_id, "failed" if failed else "done", story.error if failed else None)

    def _chain(self) -> None:
        self.step("base_model", "base model · example-model", [])
        self.step("mixture", "mixture", [], base="base_model")
        self.step("substitute", "substitute · the cliff", self.cliff())
        for index, stage in enumerate(self.story.stages):
            log = self.training(index)
            self.step("stage", f"stage {index} · lambda {stage['l1']:g}", [], log=log, key=f"stage{index}", stage=index)
        self.step(
            "calibrate",
            "calibrate · threshold",
            self.thresholds(),
            meta={"threshold": 0.05, "max_ppl_increase_pct": 1.0},
        )
        for setting, _ in SETTINGS:
            self.step("evaluate", f"evaluate · {setting}", self.evaluation(setting), key=f"evaluate {setting}")
        self.step("predictor", "predictor", self.predictors())
        self.step("speed", "speed", self.speed())
        self.step("export", "export", self.export())

    def step(
        self,
        step: str,
        label: str,
        facts: list[dict[str, Any]],
        *,
        log: list[dict[str, Any]] | None = None,
        key: str | None = None,
        stage: int | None = None,
        meta: dict[str, Any] | None = None,
        **inputs: str,
    ) -> None:
        run_id, key = self.story.run_id, key or step
        payload = {"step": step, "version": 1, "config": {"of": run_id, "key": key}, "inputs": {}, "seed": 42}
        step_id = self.ledger.start_step(run_id, step=step, stage=stage, label=label, fingerprint=fingerprint(payload))
        if key == self.story.fails_at:
            self.ledger.end_step(step_id, status="failed", error=self.story.error, hint="lower train.lr")
            raise _Stopped
        work = self.store.work_folder(step, fingerprint(payload))
        work.mkdir(parents=True)
        looks = [
            {"stage": r["stage"], "step": r["step"], "corpus": c, "num_tokens": 64, "lm_loss": 2.0, "sparsity": 0.75}
            for r in log or []
            if r["step"] % 40 == 0
            for c in self.story.corpora
        ]
        for name, lines in (("facts.jsonl", facts), ("log.jsonl", log or []), ("held_out.jsonl", looks)):
            (work / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (work / "key").write_text(f"{run_id} {key}", encoding="utf-8")
        before = {role: self.made[name] for role, name in inputs.items()}
        if self.made and not before:
            before = {"before": list(self.made.values())[-1]}
        artifact = self.store.commit(
            work, step=step, label=label, payload=payload, inputs=before, provenance=MACHINE, meta=meta or {}
        )
        self.made[key] = artifact
        self.ledger.record_artifact(artifact.path)
        self.ledger.end_step(step_id, status="cached" if key in self.story.cached else "done", artifact=artifact.digest)
        if key == self.story.until:
            raise _Stopped

    def variant(self, setting: str) -> dict[str, Any]:
        activation = dict(SETTINGS).get(setting, "relu")
        tokens = {"original": 0, "substituted": 0, "vanilla_relu": 30_720}.get(setting, 174_080)
        return {
            "table": "variants",
            "variant": f"{setting}@0123abcd",
            "model": "example-model",
            "setting": setting,
            "activation": activation,
            "checkpoint": self._checkpoint(),
            "tokens_seen": tokens,
        }

    def _checkpoint(self) -> str | None:
        stages = [a for key, a in self.made.items() if key.startswith("stage")]
        return stages[-1].digest if stages else None

    def cliff(self) -> list[dict[str, Any]]:
        facts = []
        for setting, base in (("original", 3.3), ("substituted", 612.0)):
            facts.append(self.variant(setting))
            for corpus in self.story.corpora:
                facts.append(
                    {
                        "table": "evaluations",
                        "variant": f"{setting}@0123abcd",
                        "task": f"calibration/{corpus}",
                        "corpus": corpus,
                        "metric": "token_perplexity",
                        "value": base * self.random.uniform(0.9, 1.2),
                        "n": 8192,
                        "batch_size": 4,
                    }
                )
        return facts

    def training(self, index: int) -> list[dict[str, Any]]:
        stages = self.story.stages
        first = stages[index - 1]["until_step"] if index else 0
        low = stages[index - 1]["l1"] if index else 0.0
        rows = []
        for step in range(first + 1, stages[index]["until_step"] + 1):
            if step % self.story.steps_logged_every:
                continue
            share = (step - first) / (stages[index]["until_step"] - first)
            ramp = stages[index].get("ramp") == "sine"
            factor = (
                low + (stages[index]["l1"] - low) * (1 - math.cos(math.pi * share)) / 2 if ramp else stages[index]["l1"]
            )
            zeros = 0.91 - 0.42 / (1 + 4 * factor) + self.random.gauss(0, 0.004)
            loss = 1.35 + 4.5 * math.exp(-step / 9) + 0.12 * factor + self.random.gauss(0, 0.11)
            rows.append(
                {
                    "stage": index,
                    "step": step,
                    "tokens": step * 512,
                    "l1_lambda": factor,
                    "lr": 3e-4,
                    "lm_loss": loss,
                    "l1": 0.4,
                    "l1_term": factor * 0.4,
                    "mean_abs_x1": 0.02,
                    "sparsity": min(1.0, zeros),
                    "grad_norm": 1.0,
                    "tokens_per_s": 231.0 + self.random.uniform(-9, 9),
                    "wall_s": 2.2,
                }
            )
        return rows

    def thresholds(self) -> list[dict[str, Any]]:
        facts = [self.variant("prosparse_star")]
        for corpus, base in [*zip(self.story.corpora, (2.4, 11.2, 5.1, 7.7, 3.0, 19.0), strict=False), ("mixed", 4.4)]:
            for t in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3):
                rise = 3.4 * t**2 - 0.01 * t + self.random.gauss(0, 0.0003)
                facts.append(
                    {
                        "table": "thresholds",
                        "variant": "prosparse_star@0123abcd",
                        "rule": "grid",
                        "scope": "global",
                        "threshold": t,
                        "corpus": corpus,
                        "num_tokens": 8192,
                        "perplexity": base * (1 + rise),
                        "sparsity": 0.845 + 0.11 * t / (t + 0.06) + base / 2000,
                        "chosen": t == 0.05,
                    }
                )
        return facts

    def evaluation(self, setting: str) -> list[dict[str, Any]]:
        variant = f"{setting}@0123abcd"
        facts = [self.variant(setting)]
        dearer = {"original": 1.0, "vanilla_relu": 1.16, "prosparse_star": 1.21}.get(setting, 1.22)
        zeros = {"original": 0.0, "vanilla_relu": 0.61, "prosparse_star": 0.845}.get(setting, 0.893)
        for corpus, base in zip(self.story.corpora, (2.4, 11.2, 5.1, 7.7, 3.0, 19.0), strict=False):
            facts.append(
                {
                    "table": "evaluations",
                    "variant": variant,
                    "corpus": corpus,
                    "metric": "token_perplexity",
                    "value": base * dearer,
                    "stderr": 0.02 * base if self.story.has_stderr else None,
                    "n": 8190,
                    "dtype": "fp32",
                    "batch_size": 4,
                    "higher_is_better": False,
                    "harness_version": "0.4.13",
                    "note": "windows of 512 tokens",
                }
            )
            for layer in range(self.story.num_layers):
                depth = layer / max(1, self.story.num_layers - 1)
                share = zeros * (1 - 0.12 * math.exp(-((depth - 0.1) ** 2) / 0.01)) + (
                    0.02 * self.random.random() if zeros else 0
                )
                facts.append(
                    {
                        "table": "sparsity",
                        "variant": variant,
                        "corpus": corpus,
                        "layer": layer,
                        "num_tokens": 8190,
                        "sparsity": min(1.0, share),
                        "dead_frac": 0.002 * layer / (layer + 3) if zeros > 0.8 else 0.0,
                        "mean_abs_x1": 0.02 * (1 - 0.9 * zeros),
                        "mean_abs_live": 0.02 * (1 - 0.9 * zeros) / (1 - min(share, 0.99)),
                        "chunk_sparsity": 0.7 * share,
                        "threshold": 0.05 if setting == "prosparse" else None,
                    }
                )
        score = {"original": 0.633, "vanilla_relu": 0.6}.get(setting, 0.617)
        for metric, value in (("acc", score), ("acc_norm", score - 0.05)):
            facts.append(
                {
                    "table": "evaluations",
                    "variant": variant,
                    "task": "function_choice",
                    "metric": metric,
                    "value": value,
                    "stderr": 0.063,
                    "n": 60,
                    "num_fewshot": 0,
                    "higher_is_better": True,
                    "headline": metric == "acc",
                }
            )
        return facts

    def predictors(self) -> list[dict[str, Any]]:
        facts = [self.variant("prosparse")]
        for layer in range(self.story.num_layers):
            for cutoff, recall, predicted in (
                (0.1, 0.985, 0.51),
                (0.25, 0.96, 0.66),
                (0.5, 0.912, 0.767),
                (0.75, 0.8, 0.85),
            ):
                facts.append(
                    {
                        "table": "predictors",
                        "variant": "prosparse@0123abcd",
                        "layer": layer,
                        "cutoff": cutoff,
                        "hidden": 128,
                        "label_rule": "nonzero",
                        "recall": min(1.0, recall + self.random.uniform(-0.03, 0.02)),
                        "predicted_sparsity": predicted + self.random.uniform(-0.05, 0.05),
                        "true_sparsity": 0.893,
                        "num_tokens": 4096,
                    }
                )
        return facts

    def export(self) -> list[dict[str, Any]]:
        score = {
            "metric": "token_perplexity",
            "value": 2.93,
            "stderr": 0.05,
            "n": 1490,
            "limit": 3,
            "note": "2.93 before",
        }
        fact = {"table": "evaluations", "variant": "prosparse@0123abcd", **score}
        return [self.variant("prosparse"), *({**fact, "task": f"exported/{c}"} for c in self.story.corpora)]

    def speed(self) -> list[dict[str, Any]]:
        facts = [self.variant("prosparse")]
        times = {
            "gate": (140.0, 141.0, 1.0),
            "s2": (140.0, 33.0, 9.35),
            "s3": (150.0, 38.0, 9.35),
            "ffn": (430.0, 145.0, 2.47),
        }
        kernel_providers = ("torch", "native_dense", "native")
        for mask_source in ("recorded", "random"):
            for kernel, (dense, sparse, limit) in times.items():
                for provider, p50 in zip(kernel_providers, (dense, 0.8 * dense, sparse), strict=True):
                    fact = self.timing(kernel, provider, p50, limit if provider == "native" else None)
                    facts.append({**fact, "mask_source": mask_source, "cache": "cold", "timer": "process_cpu"})
        for sparsity, fast in ((0.5, 300.0), (0.9, 160.0)):
            limit = 3 / (1 + 2 * (1 - sparsity))
            for provider, p50 in (("torch", 430.0), ("native_dense", 344.0), ("native", fast)):
                fact = self.timing("ffn", provider, p50, limit if provider == "native" else None)
                facts.append({**fact, "variant": None, "mask_source": "random", "num_tokens": 1, "sparsity": sparsity})
        for provider, p50, most in (("transformers_dense", 21000.0, None), ("transformers_sparse", 16000.0, 1.54)):
            facts.append({**self.timing("decode", provider, p50, most), "num_tokens": 1, "tokens_per_s": 1e6 / p50})
        return facts

    def timing(self, kernel: str, provider: str, p50: float, limit: float | None) -> dict[str, Any]:
        passed = self.story.gates_pass or kernel != "s3" or limit is None
        times = {"p20_us": 0.96 * p50, "p50_us": p50, "p80_us": 1.07 * p50, "gbps": 11.3}
        shape = {"d_model": 576, "d_ff": 1536, "num_tokens": 64, "dtype": "float32", "threads": 1}
        machine = {"host": "bench-1", "cpu": "Example CPU 9000", "device": "cpu"}
        return {
            **{"table": "speed", "kernel": kernel, "provider": provider, "variant": "prosparse@0123abcd"},
            **{"sparsity": 0.893, "mask_source": "recorded", "timer": "wall", "num_reps": 400, "gate_passed": passed},
            **{
                "rel_err": 2e-7 if passed else 3e-2,
                "byte_ratio": limit,
                "note": None if passed else "failed the gate",
            },
            **shape,
            **machine,
            **(times if passed else dict.fromkeys(times)),
        }


def write_story(home: Path, scribe: type[Scribe] = Scribe, **changes: Any) -> tuple[Ledger, Story]:
    """A ledger under ``home`` that tells one run; ``changes`` are fields of :class:`Story`."""
    story = Story(**changes)
    return scribe(home, story).write(), story
