"""What a run came to, read from its artifacts: the same data for the closing table and for ``--json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosparse_core.recipe import Recipe
from prosparse_core.settings import FATRELU
from prosparse_core.source_precision import named
from prosparse_core.store import FACTS, Artifact, make_folder, read_record, write_json
from tasks.step import Run

ENDINGS = {"budget": "; ended by the budget", "saturated": "; ended where larger ones bring no more sparsity"}
"""What ended the search for thresholds."""
MOST_HELD_OUT = 4
"""Lines about thresholds below the closing table; a comparison calibrates every setting and seed."""


@dataclass(frozen=True)
class SettingResult:
    """One row of the closing table."""

    setting: str
    perplexity: Mapping[str, float]
    sparsity: Mapping[str, float]
    accuracy: float | None
    threshold: float | None
    """FATReLU's, as the mean over layers where each has its own."""
    l1: float | None = None
    factor: float | None = None
    """l1 where the setting has rows of several, or is a fixed factor."""
    seed: int | None = None
    """Given where it is not the recipe's."""
    scope: str | None = None
    """global or per_layer: whether the threshold is that of every layer or a mean."""

    @property
    def threshold_text(self) -> str | float | None:
        """The threshold as the closing table shows it."""
        return f"mean {self.threshold:.3g}" if self.scope == "per_layer" else self.threshold

    @property
    def label(self) -> str:
        """The setting, with what tells it from others of that name: its last factor, a further seed."""
        factor = "" if self.factor is None else f" {self.factor:g}"
        return self.setting + factor + ("" if self.seed is None else f" (seed {self.seed})")


@dataclass
class Result:
    """Everything people are told at the end of a run."""

    run_id: str
    recipe: str
    model: str = ""
    """With the precision its weights came in."""
    corpora: list[str] = field(default_factory=list)
    window_tokens: int | None = None
    """Of the windows that held-out text was read in."""
    settings: list[SettingResult] = field(default_factory=list)
    predictor: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    headline: list[dict[str, Any]] = field(default_factory=list)
    """Of the view ``speedup``: S2, S3, FFN and decoding over the best dense kernel of the same session."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """What thresholds cost and bring on the evaluation files, beside what the calibration files promised."""
    benchmarks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By the label of a setting: task, metric, value, stderr, n, num_fewshot, headline, partial, note."""
    places: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The lines below the table."""
        lines = [
            f"thresholds  {row['setting']}: perplexity {row['perplexity_increase_pct']:+.2f} % on evaluation files "
            f"({row['promised_increase_pct']:+.2f} % on calibration files), sparsity "
            f"{100 * row['sparsity_gain']:+.2f} points ({100 * row['promised_sparsity_gain']:+.2f})"
            + ENDINGS.get(row["stopped_by"], "")
            for row in self.held_out[:MOST_HELD_OUT]
        ]
        if len(self.held_out) > MOST_HELD_OUT:
            more = len(self.held_out) - MOST_HELD_OUT
            lines.append(f'            and {more} more: prosparse query "FROM threshold_held_out"')
        if self.predictor:
            p = self.predictor
            lines.append(
                f"predictor   recall {_pct(p['recall'], 'no neuron is active')}, "
                f"predicted sparsity {_pct(p['predicted_sparsity'])} (true {_pct(p['true_sparsity'])}) "
                f"at cutoff {p['cutoff']:g}"
            )
        if self.speed:
            lines += speed_lines(self.speed, self.headline)
            lines += decode_lines(self.speed.get("decode") or [])
        lines += [f"{name:<11} {place}" for name, place in self.places.items()]
        counted = ", ".join(f"{n} {outcome}" for outcome, n in self.steps.items())
        lines.append(f"steps       {counted}")
        return lines


BASELINES = {"torch": "torch", "transformers_dense": "transformers", "native_dense": "our dense"}


def speed_lines(speed: Mapping[str, Any], headline: Sequence[Mapping[str, Any]]) -> list[str]:
    """The speed-ups over one baseline, the faster dense one of the run, and a line for what is above its byte ratio.

    Args:
        speed: the meta of a speed step.
        headline: rows of the view ``speedup``, one a kernel.
    """
    rows, why = {row["kernel"]: row for row in headline}, set(speed.get("reasons", {}).values())
    if not rows and len(why) == 1:  # no such FFN can be computed sparsely
        return [f"speed-up    n/a: {why.pop()}"]
    parts, remarks = [], []
    for key, name in (("s2", "S2"), ("s3", "S3"), ("ffn", "FFN"), ("decode", "decode")):
        row = rows.get(key)
        if row is None:
            parts.append(f"{name} n/a")
            continue
        if row["kernel"] == "decode" and row["prompt_tokens"]:
            name += f" after {row['prompt_tokens']} tokens"
        ratio = "n/a" if row["byte_ratio"] is None else f"{row['byte_ratio']:.2f}x"
        mark = "!" if row["above_byte_ratio"] else ""
        parts.append(f"{name} {row['speedup']:.2f}x{mark} ({BASELINES[row['baseline']]}; byte ratio {ratio})")
        remarks += [f"{name} {row['above_byte_ratio_note']}"] if mark else []
    lines = [
        f"speed-up    over the faster of torch and our dense kernel: {', '.join(parts)} [{speed['implementation']}]"
    ]
    notes = dict.fromkeys(row["byte_ratio_note"] for row in headline if row["byte_ratio_note"])
    return (
        lines + [f"            ! {remark}" for remark in remarks] + [f"            byte ratio {note}" for note in notes]
    )


def decode_lines(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds of one token, a line for each length of prompts, dtype and kind of masks, with ratios to the fastest
    dense way of the line; predictors stand in the report.
    """
    groups: dict[tuple[int, str, str | None], list[Mapping[str, Any]]] = {}
    for way in ways:
        if way["cutoff"] is None and way["ms"] is not None:
            groups.setdefault((way["prompt_tokens"], way["dtype"], way["mask_source"]), []).append(way)
    lines = []
    for (prompt, dtype, masks), found in groups.items():
        zeros = "the dense original" if masks is None else f"{_pct(found[-1]['sparsity'])} zeros"
        about = f"after {prompt} tokens, {dtype}, {zeros}"
        about += ", thresholds raised for timing" if masks == "raised" else ""
        about += "".join(f"; x: over {BASELINES[b]}" for b in {w["baseline"]: 0 for w in found if w["baseline"]})
        parts = [
            f"{way['provider'].replace('_', ' ')} {way['ms']:.1f}"
            + (f" ({way['speedup']:.2f}x)" if way["speedup"] else "")
            for way in found
        ]
        lines.append(f"ms/token    {', '.join(parts)} [{about}]")
    return lines


def of_run(run: Run) -> Result:
    """The result of a run from the artifacts it made or found."""
    result = Result(run.run_id, run.recipe.name)
    calibrated: Mapping[str, Any] = {}
    for _, artifact, outcome in run.history:
        result.steps[outcome] = result.steps.get(outcome, 0) + 1
        if artifact is None or artifact.folder is None:
            continue
        meta = artifact.meta()
        if artifact.step == "calibrate":
            calibrated = meta
        elif artifact.step == "evaluate":
            fact = _variant_fact(artifact)
            result.settings.append(_setting(artifact, meta, calibrated, fact, run.recipe))
            if not result.model or fact["model"] == run.recipe.model.id:
                result.model = named(fact["model"], fact.get("source_precision"))
            result.corpora = list(meta["perplexity"])
            result.window_tokens = meta.get("max_length")
            if meta.get("benchmarks"):
                result.benchmarks[result.settings[-1].label] = meta["benchmarks"]
        elif artifact.step == "predictor":
            result.predictor = meta
        elif artifact.step == "speed":
            result.speed, result.headline = meta, _headline(run, artifact)
        elif artifact.step == "export":
            result.places["model"] = str(artifact.path / "hf")
        elif artifact.step == "report":
            result.places["report"] = str(artifact.path / "report.html")
    result.places["ledger"] = str(run.home / "ledger.duckdb")
    if calibrated:
        result.held_out = _held_out(run)
    return result


def _held_out(run: Run) -> list[dict[str, Any]]:
    literal = "'" + run.run_id.replace("'", "''") + "'"
    return run.ledger.query(
        "SELECT setting, variant, scope, threshold, cett, stopped_by, perplexity_increase_pct, promised_increase_pct, "
        f"sparsity_gain, promised_sparsity_gain FROM threshold_held_out WHERE run_id = {literal} AND corpus = 'mixed' "
        "AND perplexity_increase_pct + promised_increase_pct + sparsity_gain + promised_sparsity_gain IS NOT NULL "
        "ORDER BY setting <> 'prosparse', setting, variant"
    ).records()


def _headline(run: Run, artifact: Artifact) -> list[dict[str, Any]]:
    """What the step says first: one row a kernel, exact, of the model's own masks, after the shortest prompts."""
    return run.ledger.query(
        "SELECT kernel, provider, baseline, dtype, prompt_tokens, speedup, byte_ratio, byte_ratio_note, "
        f"above_byte_ratio, above_byte_ratio_note FROM speedup WHERE artifact = '{artifact.digest}' AND is_best "
        "AND kernel IN ('s2', 's3', 'ffn', 'decode') AND num_tokens = 1 AND cutoff IS NULL "
        "AND provider IN ('native', 'native_exact', 'transformers_sparse') "
        "AND (variant IS NULL OR (mask_source = 'recorded' AND dtype = 'float32')) "
        "QUALIFY row_number() OVER (PARTITION BY kernel ORDER BY variant NULLS LAST, prompt_tokens) = 1"
    ).records()


def _variant_fact(artifact: Artifact) -> Mapping[str, Any]:
    """The line of an evaluation's facts that describes its variant."""
    facts = (json.loads(line) for line in (artifact.path / FACTS).read_text(encoding="utf-8").splitlines())
    return next(fact for fact in facts if fact["table"] == "variants")


def _setting(
    artifact: Artifact,
    meta: Mapping[str, Any],
    calibrated: Mapping[str, Any],
    training: Mapping[str, Any],
    recipe: Recipe,
) -> SettingResult:
    variant = read_record(artifact.path)["payload"]["config"]["variant"]
    thresholds = calibrated if variant["activation"] == "fatrelu" else {}
    has_factors = variant["setting"].removesuffix(FATRELU) == "fixed_l1" or (
        variant["setting"] in ("prosparse_star", "prosparse") and len(recipe.compare.final_l1) > 1
    )
    return SettingResult(
        setting=variant["setting"],
        perplexity=meta["perplexity"],
        sparsity=meta["sparsity"],
        accuracy=next(iter(meta.get("accuracy", {}).values()), None),
        threshold=thresholds.get("mean_threshold"),
        scope=thresholds.get("scope"),
        l1=training["l1"],
        factor=training["l1"] if has_factors else None,
        seed=None if training["seed"] in (None, recipe.seed) else training["seed"],
    )


def _pct(value: float | None, reason: str = "not measured") -> str:
    return f"n/a ({reason})" if value is None else f"{100 * value:.1f} %"


def save(result: Result, home: Path) -> None:
    """Keep the result of a run beside the ledger, for ``run --json``."""
    write_json(make_folder(home / "runs") / f"{result.run_id}.json", dataclasses.asdict(result))


def load(home: Path, run_id: str) -> dict[str, Any]:
    """What :func:`save` wrote."""
    return json.loads((home / "runs" / f"{run_id}.json").read_text(encoding="utf-8"))
