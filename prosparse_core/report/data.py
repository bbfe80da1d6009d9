"""What a report shows, read from the ledger: one query for each subject, filtered to the artifacts of one run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger, Table

Record = dict[str, Any]

SETTINGS = {
    "original": ("Original", "dense activation"),
    "vanilla_relu": ("Vanilla ReLU", "ReLU, no regularization"),
    "shifted_relu": ("Shifted ReLU", "ReLU with a fixed shift"),
    "fixed_l1": ("Fixed L1", "constant lambda"),
    "prosparse_star": ("ProSparse*", "before threshold shifting"),
    "prosparse": ("ProSparse", "with FATReLU thresholds"),
}
"""The rows of the paper's tables in their order: what people call each, and what it is."""
EXPECTED = ("original", "vanilla_relu", "prosparse_star", "prosparse")
MIXED = "mixed"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
QUERIES: dict[str, str] = {
    "run": "SELECT * FROM runs WHERE run_id = {run}",
    "steps": """
SELECT s.step_id, s.step, s.stage, s.label, s.status, s.wall_s, s.started_at, s.ended_at, s.error, s.hint, s.artifact,
       a.wall_s AS made_in_s, a.created_at AS made_at, a.bytes, a.provenance, a.meta
FROM steps s LEFT JOIN artifacts a ON (a.digest, a.fingerprint) = (s.artifact, s.fingerprint)
WHERE s.run_id = {run} ORDER BY s.started_at, s.step_id""",
    "lineage": """
SELECT DISTINCT l.artifact, l.role, l.input, l.input_step
FROM lineage l JOIN run_artifacts r USING (artifact) WHERE r.run_id = {run} ORDER BY ALL""",
    "leaderboard": "SELECT * FROM leaderboard WHERE run_id = {run}",
    "checkpoints": """
SELECT DISTINCT v.variant, v.setting, v.checkpoint
FROM variant_facts v JOIN run_artifacts r USING (artifact) WHERE r.run_id = {run} ORDER BY ALL""",
    "training": """
SELECT stage, step, tokens, l1_lambda, lm_loss, l1_term, sparsity, tokens_per_s, artifact
FROM loss_curve WHERE run_id = {run} ORDER BY step, stage""",
    "cliff": """
SELECT v.setting, e.corpus, e.value AS perplexity, e.n
FROM evaluations e JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} AND r.step = 'substitute' AND e.metric = 'token_perplexity' ORDER BY v.setting, e.corpus""",
    "exported": """
SELECT e.task, e.metric, e.value, e.stderr, e.n, e."limit", e.note
FROM evaluations e JOIN run_artifacts r USING (artifact)
WHERE r.run_id = {run} AND r.step = 'export' ORDER BY e.task, e.metric""",
    "scores": """
SELECT v.setting, variant, e.task, e.corpus, e.metric, e.value, e.stderr, e.n, e.num_fewshot, e."limit",
       e.headline, e.note
FROM evaluations e JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} AND r.step NOT IN ('substitute', 'export')
  AND (e.task IS NOT NULL OR e.metric = 'token_perplexity')
QUALIFY row_number() OVER (PARTITION BY variant, e.task, e.corpus, e.metric
                           ORDER BY e."limit" IS NOT NULL, r.measured_at DESC, artifact) = 1
ORDER BY v.setting, e.task, e.corpus, e.metric""",
    "layers": """
SELECT v.setting, variant, s.corpus, s.layer, s.sparsity, s.chunk_sparsity, s.dead_frac, s.mean_abs_live,
       h.survivor_ratio, s.num_tokens, s.threshold
FROM sparsity s JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
LEFT JOIN shrinkage h ON (h.run_id, h.variant, h.corpus, h.layer) = (r.run_id, variant, s.corpus, s.layer)
WHERE r.run_id = {run}
QUALIFY row_number() OVER (PARTITION BY variant, s.corpus, s.layer ORDER BY r.measured_at DESC, artifact) = 1
ORDER BY v.setting, s.corpus, s.layer""",
    "tradeoff": """
SELECT corpus, threshold, sparsity, perplexity, perplexity_increase_pct, sparsity_gain, chosen, num_tokens,
       rule, scope, setting
FROM threshold_tradeoff WHERE run_id = {run} ORDER BY setting, rule, corpus, threshold""",
    "predictors": """
SELECT v.setting, p.layer, p.cutoff, p.hidden, p.label_rule, p.recall, p.predicted_sparsity, p.true_sparsity,
       p.num_tokens
FROM predictors p JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} ORDER BY v.setting, p.hidden, p.label_rule, p.cutoff, p.layer""",
    # Layers timed one by one count together, by their summed times. Masks of a sweep over sparsities stay apart.
    "speedups": """
SELECT kernel, provider, baseline, setting, CASE WHEN layer IS NULL THEN sparsity END AS swept_sparsity,
       avg(sparsity) AS sparsity, sum(baseline_us) AS baseline_us, sum(p50_us) AS p50_us,
       sum(baseline_us) / sum(p50_us) AS speedup,
       sum(baseline_us) / sum(baseline_us / speedup_low) AS speedup_low,
       sum(baseline_us) / sum(baseline_us / speedup_high) AS speedup_high,
       sum(baseline_us) / sum(baseline_us / limit_speedup) AS limit_speedup,
       max(rel_err) AS rel_err, count(*) AS num_timings,
       d_model, d_ff, num_tokens, dtype, mask_source, threads, timer, cache, device, cpu
FROM speedup WHERE run_id = {run} GROUP BY ALL ORDER BY kernel, provider, baseline, sparsity""",
    "refused": """
SELECT s.kernel, s.provider, v.setting, avg(s.sparsity) AS sparsity, max(s.rel_err) AS rel_err,
       count(*) AS num_timings, count(s.gate_passed) AS num_checked, any_value(s.note) AS note,
       s.d_model, s.d_ff, s.num_tokens, s.dtype, s.mask_source, s.threads, s.timer, s.cache, s.device, s.cpu
FROM speed s JOIN run_artifacts r USING (artifact) LEFT JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} AND s.gate_passed IS NOT TRUE AND NOT is_baseline(s.provider)
GROUP BY ALL ORDER BY s.kernel, s.provider""",
    "timings": """
SELECT s.kernel, s.provider, v.setting, s.sparsity, s.p20_us, s.p50_us, s.p80_us, s.num_reps, s.tokens_per_s, s.gbps,
       s.rel_err, s.gate_passed, s.limit_speedup, s.d_model, s.d_ff, s.num_tokens, s.dtype, s.mask_source, s.layer,
       s.threads, s.timer, s.cache, s.device, s.cpu, s.note
FROM speed s JOIN run_artifacts r USING (artifact) LEFT JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} ORDER BY ALL""",
}


@dataclass(frozen=True)
class ReportData:
    """The rows behind a report, by subject; NaN and infinities are None."""

    run: Record
    recipe: Record
    """The resolved recipe as plain YAML values; empty when the ledger's copy is not readable."""
    subjects: dict[str, list[Record]]
    sql: dict[str, str]

    def __getitem__(self, subject: str) -> list[Record]:
        return self.subjects[subject]

    @property
    def corpora(self) -> list[str]:
        """In the recipe's order, then what else was measured; never the mixture of all of them."""
        section = self.recipe.get("data")
        sources = section.get("sources") if isinstance(section, dict) else None
        named = [str(s.get("name")) for s in sources or [] if isinstance(s, dict)]
        measured = [
            r["corpus"] for name in ("scores", "layers", "tradeoff", "cliff") for r in self[name] if r["corpus"]
        ]
        found = set(measured)
        return list(dict.fromkeys([*(n for n in named if n in found), *sorted(found - {MIXED})]))

    @property
    def settings(self) -> list[tuple[str, str | None]]:
        """(setting, variant) in the paper's order; the expected ones even when they were not measured."""
        measured = {(r["setting"], r["variant"]) for name in ("scores", "layers") for r in self[name]}
        there = {setting for setting, _ in measured}
        missing: set[tuple[str, str | None]] = {(s, None) for s in EXPECTED if s not in there}
        order = list(SETTINGS)
        return sorted(
            measured | missing,
            key=lambda sv: (order.index(sv[0]) if sv[0] in order else len(order), sv[0], sv[1] or ""),
        )

    def steps_of(self, *names: str) -> list[Record]:
        return [s for s in self["steps"] if s["step"] in names]

    def why_missing(self, step: str, label_part: str = "") -> str:
        """Why nothing of a step is in the ledger, in words that stay true."""
        steps = [s for s in self.steps_of(step) if label_part in s["label"]]
        failed = next((s for s in steps if s["status"] == "failed"), None)
        if failed:
            return f"the step “{failed['label']}” failed"
        if any(s["status"] in ("done", "cached") for s in steps):
            return f"the step “{steps[-1]['label']}” recorded no such number"
        if any(s["status"] == "running" for s in steps):
            return f"the step “{steps[-1]['label']}” was still running when this was written"
        broken = next((s for s in self["steps"] if s["status"] == "failed"), None)
        if broken:
            return f"the run failed before its {step} step, at “{broken['label']}”"
        return f"this run has no {'such ' if label_part else ''}{step} step"


def collect(ledger: Ledger, run_id: str) -> ReportData:
    """Everything the report of one run needs.

    Raises:
        BadInput: the ledger knows no such run.
    """
    literal = "'" + run_id.replace("'", "''") + "'"
    sql = {name: text.strip().replace("{run}", literal) for name, text in QUERIES.items()}
    runs = _records(ledger.query(sql["run"]))
    if not runs:
        raise BadInput(f"no run {run_id!r} in {ledger.path}", hint='prosparse query "SELECT run_id, status FROM runs"')
    subjects = {name: _records(ledger.query(text)) for name, text in sql.items() if name != "run"}
    subjects["training"] = _one_path(subjects)
    return ReportData(runs[0], _recipe(runs[0]["recipe_yaml"]), subjects, sql)


def _records(table: Table) -> list[Record]:
    return [_shown(record) for record in table.records()]


def _shown(value: Any) -> Any:
    """What a page can hold: NaN and infinities as None, control characters as a replacement character, at any depth."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_shown(k): _shown(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shown(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recipe(text: str) -> Record:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return _shown(recipe) if isinstance(recipe, dict) else {}


def _one_path(subjects: dict[str, list[Record]]) -> list[Record]:
    """The log of one chain of stages: where a run trained several settings, that of the last of the paper's rows."""
    rows = subjects["training"]
    artifacts_of_stage: dict[Any, set[str]] = {}
    for row in rows:
        artifacts_of_stage.setdefault(row["stage"], set()).add(row["artifact"])
    if all(len(found) == 1 for found in artifacts_of_stage.values()):
        return rows
    order = list(SETTINGS)
    ends = [c for c in subjects["checkpoints"] if c["checkpoint"] and c["setting"] in order]
    if not ends:
        return rows
    inputs: dict[str, list[str]] = {}
    for edge in subjects["lineage"]:
        inputs.setdefault(edge["artifact"], []).append(edge["input"])
    path, todo = set(), [max(ends, key=lambda c: order.index(c["setting"]))["checkpoint"]]
    while todo:
        artifact = todo.pop()
        if artifact not in path:
            path.add(artifact)
            todo += inputs.get(artifact, [])
    return [row for row in rows if row["artifact"] in path]
