"""What a report shows, read from the ledger: one query for each subject, filtered to the artifacts of one run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger, Table
from prosparse_core.report.courses import Record, course_order, courses, is_other, last_factor, main_path, seed_order
from prosparse_core.report.format import count, is_number
from prosparse_core.report.names import EXPECTED, SETTINGS, SHIFTED, SHIFTED_ABOUT, factor, seed
from prosparse_core.source_precision import named

__all__ = ["MIXED", "SETTINGS", "Record", "ReportData", "collect"]

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
    "leaderboard": "SELECT * FROM leaderboard WHERE run_id = {run} ORDER BY setting, l1, seed, variant",
    "differences": """
SELECT p.*, benchmark_of(p.task) AS benchmark FROM paired p JOIN run_artifacts r USING (artifact) WHERE r.run_id = {run}
ORDER BY p.variant, p.base, p.task, p.corpus, p.metric, p.artifact, p.base_artifact""",
    "comparison": "SELECT * FROM comparison WHERE run_id = {run} ORDER BY setting, l1, variants",
    "matched": "SELECT * FROM matched_sparsity WHERE run_id = {run} ORDER BY setting, measured, l1, variant",
    "printed": """
SELECT s.model, s.setting, s.condition, s.value AS sparsity_pct, a.value AS average_pct, s.source
FROM published s JOIN published a USING (model, setting, condition, source)
WHERE s.metric = 'sparsity_pct' AND a.metric = 'average_pct' AND s.source LIKE '%Table 5'
ORDER BY s.model DESC, sparsity_pct, s.setting""",
    "paper": """
SELECT model, setting, l1, seed, variant, metric, ours, stderr, partial, not_measured, paper, gap, paper_model,
       paper_model(model) IS NULL AS is_foreign, reason, baseline, source
FROM paper_gap WHERE run_id = {run} AND paper IS NOT NULL ORDER BY setting, l1, seed, metric, variant""",
    "checkpoints": """
SELECT DISTINCT v.variant, v.setting, v.checkpoint, v.seed, v.l1
FROM variant_facts v JOIN run_artifacts r USING (artifact) WHERE r.run_id = {run} ORDER BY ALL""",
    "training": """
SELECT c.stage, c.step, c.tokens, c.l1_lambda, c.lr, c.lm_loss, c.l1_term, c.sparsity,
       c.tokens_per_s, h.lm_loss AS held_out_loss, h.sparsity AS held_out_sparsity, c.artifact
FROM loss_curve c LEFT JOIN held_out_curve h
  ON (h.run_id, h.artifact, h.stage, h.step, h.corpus) = (c.run_id, c.artifact, c.stage, c.step, 'mixed')
WHERE c.run_id = {run} ORDER BY c.step, c.stage, c.artifact""",
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
       e.headline, e.dtype, e.batch_size, e.note, e.window_tokens, e.num_documents
FROM evaluations e JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} AND r.step NOT IN ('substitute', 'export')
  AND (e.task IS NOT NULL OR e.metric = 'token_perplexity')
QUALIFY row_number() OVER (PARTITION BY variant, e.task, e.corpus, e.metric
                           ORDER BY e."limit" IS NOT NULL, r.measured_at DESC, artifact) = 1
ORDER BY v.setting, e.task, e.corpus, e.metric""",
    "benchmarks": """
WITH asked AS (
  SELECT v.setting, variant, benchmark_of(e.task) AS benchmark, max(e.num_fewshot) AS num_fewshot,
         max(e."limit") AS "limit", max(e.dtype) AS dtype, max(e.batch_size) AS batch_size,
         list_sort(list(DISTINCT e.task || ': ' || e.note) FILTER (e.value IS NULL)) AS reasons
  FROM evaluations e JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
  WHERE r.run_id = {run} AND e.task IS NOT NULL AND e.corpus IS NULL GROUP BY ALL)
SELECT a.*, b.suite, b.metric, b.value, b.stderr, b.n, b.partial, b.not_measured
FROM asked a LEFT JOIN benchmarks b ON b.run_id = {run} AND (b.variant, b.benchmark) = (a.variant, a.benchmark)
ORDER BY list_position(
  flatten([members_of(s) FOR s IN ['code', 'commonsense', 'reading', 'gsm8k', 'mmlu', 'bbh', 'agieval']]), a.benchmark
) NULLS LAST, a.benchmark, a.variant""",
    "suites": """
SELECT setting, variant, suite, value, stderr, num_benchmarks, partial, not_measured, len(members_of(suite)) AS expected
FROM suites WHERE run_id = {run} AND len(members_of(suite)) > 1 ORDER BY suite, variant""",
    "layers": """
SELECT v.setting, variant, s.corpus, s.layer, s.sparsity, s.chunk_sparsity, s.dead_frac, s.mean_abs_live,
       h.survivor_ratio, s.num_tokens, s.threshold
FROM sparsity s JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
LEFT JOIN shrinkage h ON (h.run_id, h.variant, h.corpus, h.layer) = (r.run_id, variant, s.corpus, s.layer)
WHERE r.run_id = {run}
QUALIFY row_number() OVER (PARTITION BY variant, s.corpus, s.layer ORDER BY r.measured_at DESC, artifact) = 1
ORDER BY v.setting, s.corpus, s.layer""",
    "tradeoff": """
SELECT corpus, threshold, cett, sparsity, perplexity, perplexity_increase_pct, sparsity_gain, chosen, num_tokens,
       rule, scope, setting, variant, stopped_by
FROM threshold_tradeoff WHERE run_id = {run} ORDER BY setting, variant, rule, corpus, threshold""",
    "held_out": """
SELECT setting, variant, variant_before, rule, scope, corpus, perplexity_before, perplexity, perplexity_increase_pct,
       promised_increase_pct, sparsity_before, sparsity, sparsity_gain, promised_sparsity_gain
FROM threshold_held_out WHERE run_id = {run} ORDER BY setting, variant, corpus""",
    "predictors": """
SELECT v.setting, p.layer, p.cutoff, p.hidden, p.label_rule, p.recall, p.predicted_sparsity, p.true_sparsity,
       p.num_tokens
FROM predictors p JOIN run_artifacts r USING (artifact) JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} ORDER BY v.setting, p.hidden, p.label_rule, p.cutoff, p.layer""",
    # Layers timed one by one count together, by their summed times. Masks of a sweep over sparsities stay apart.
    "speedups": """
SELECT kernel, provider, baseline, is_best, setting, CASE WHEN layer IS NULL THEN sparsity END AS swept_sparsity,
       avg(sparsity) AS sparsity, sum(baseline_us) AS baseline_us, sum(p50_us) AS p50_us,
       sum(baseline_us) / sum(p50_us) AS speedup,
       sum(baseline_us) / sum(baseline_us / speedup_low) AS speedup_low,
       sum(baseline_us) / sum(baseline_us / speedup_high) AS speedup_high,
       sum(baseline_us) / sum(baseline_us / byte_ratio) AS byte_ratio, any_value(byte_ratio_note) AS byte_ratio_note,
       bool_or(above_byte_ratio) AS above_byte_ratio, any_value(above_byte_ratio_note) AS above_byte_ratio_note,
       max(rel_err) AS rel_err, count(*) AS num_timings,
       d_model, d_ff, num_tokens, prompt_tokens, dtype, mask_source, threads, timer, cache, device, cpu, cutoff
FROM speedup WHERE run_id = {run} GROUP BY ALL ORDER BY kernel, provider, baseline, sparsity, cutoff""",
    "curve": """
SELECT provider, baseline, sparsity, speedup, speedup_low, speedup_high, byte_ratio, baseline_us, p50_us, d_model,
       d_ff, dtype, threads, timer, cache, device, cpu
FROM speedup
WHERE run_id = {run} AND is_best AND kernel = 'ffn' AND variant IS NULL AND mask_source = 'random' AND num_tokens = 1
ORDER BY provider, baseline, sparsity""",
    "decode": """
SELECT s.provider, s.dtype, s.mask_source, s.cutoff, s.prompt_tokens, v.setting, s.sparsity, s.live_frac, s.p20_us,
       s.p50_us, s.p80_us, s.num_reps, s.tokens_per_s, s.gbps, s.bandwidth_share, u.speedup, u.baseline, u.byte_ratio,
       u.byte_ratio_note, u.above_byte_ratio, u.above_byte_ratio_note, t.recall, t.perplexity,
       t.perplexity_increase_pct, s.rel_err, s.gate_passed, s.threads, s.timer, s.note
FROM speed s JOIN run_artifacts r USING (artifact) LEFT JOIN variant_facts v USING (artifact, variant)
LEFT JOIN speedup u
  ON u.artifact = s.artifact AND u.run_id = r.run_id AND u.is_best AND u.kernel = 'decode'
  AND row(u.variant, u.provider, u.dtype, u.mask_source, u.sparsity, u.cutoff, u.prompt_tokens, u.threads)
    IS NOT DISTINCT FROM
      row(s.variant, s.provider, s.dtype, s.mask_source, s.sparsity, s.cutoff, s.prompt_tokens, s.threads)
LEFT JOIN decode_tradeoff t
  ON t.artifact = s.artifact AND t.run_id = r.run_id AND t.variant = s.variant AND t.provider = s.provider
  AND t.dtype = s.dtype AND s.mask_source = 'recorded'
  AND row(t.cutoff, t.prompt_tokens) IS NOT DISTINCT FROM row(s.cutoff, s.prompt_tokens)
WHERE r.run_id = {run} AND s.kernel = 'decode'
ORDER BY s.prompt_tokens, s.mask_source IS NULL, s.mask_source = 'raised', s.dtype DESC,
         s.provider <> 'transformers_dense', s.cutoff NULLS FIRST, s.p50_us DESC""",
    "refused": """
SELECT s.kernel, s.provider, v.setting, avg(s.sparsity) AS sparsity, max(s.rel_err) AS rel_err,
       count(*) AS num_timings, count(s.gate_passed) AS num_checked, any_value(s.note) AS note,
       s.d_model, s.d_ff, s.num_tokens, s.prompt_tokens, s.dtype, s.mask_source, s.threads, s.timer, s.cache,
       s.device, s.cpu, s.cutoff
FROM speed s JOIN run_artifacts r USING (artifact) LEFT JOIN variant_facts v USING (artifact, variant)
WHERE r.run_id = {run} AND s.gate_passed IS NOT TRUE AND NOT is_baseline(s.provider)
GROUP BY ALL ORDER BY s.kernel, s.provider""",
    "timings": """
SELECT s.kernel, s.provider, v.setting, s.sparsity, s.p20_us, s.p50_us, s.p80_us, s.num_reps, s.tokens_per_s, s.gbps,
       s.rel_err, s.gate_passed, s.d_model, s.d_ff, s.num_tokens, s.prompt_tokens, s.dtype, s.mask_source, s.layer,
       s.threads, s.timer, s.cache, s.device, s.cpu, s.note, s.cutoff, s.live_frac, s.bandwidth_share
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
    def model(self) -> str:
        """The run's model, and in which precision its weights came."""
        return self.model_named(self.run["model"])

    def model_named(self, model: Any) -> str:
        """A model with the precision its weights came in, as far as anything was measured or made of it."""
        rows = [r["source_precision"] for r in self["leaderboard"] if r["model"] == model]
        metas = [s["meta"] for s in self.steps_of("base_model") if s["label"] == f"base model · {model}"]
        rows += [meta.get("source_precision") for meta in metas if isinstance(meta, dict)]
        return named(str(model), next((r for r in rows if r), None))

    @property
    def is_comparison(self) -> bool:
        """Whether the run trained many settings beside each other."""
        return self.run["flow"] == "compare"

    @property
    def expected(self) -> tuple[str, ...]:
        """The settings this kind of run measures when nothing goes wrong."""
        if self.run["flow"] == "prosparse":
            return EXPECTED
        section = self.recipe.get("compare")
        if not self.is_comparison or not isinstance(section, dict):
            return ()
        imported = [i.get("setting") for i in section.get("imported") or [] if isinstance(i, dict)]
        return tuple(str(s) for s in [*(section.get("settings") or []), *imported])

    @property
    def settings(self) -> list[tuple[str, str | None]]:
        """(setting, variant) in the paper's order, then by factor and seed; the expected ones even when they were not
        measured."""
        measured = {(r["setting"], r["variant"]) for name in ("scores", "layers") for r in self[name]}
        there = {setting for setting, _ in measured}
        missing: set[tuple[str, str | None]] = {(s, None) for s in self.expected if s not in there}
        board = {r["variant"]: r for r in self["leaderboard"]}

        def order(pair: tuple[str, str | None]) -> tuple[Any, ...]:
            row = {**board.get(pair[1], {}), "setting": pair[0]}
            return (*course_order(row, self.recipe.get("seed")), pair[1] or "")

        return sorted(measured | missing, key=order)

    def details(self, setting: str, variant: str | None) -> str:
        """What tells a variant from others of its setting, such as its factor and seed; else what the setting is."""
        about = SETTINGS.get(setting, ("", SHIFTED_ABOUT if setting.endswith(SHIFTED) else ""))[1]
        rows = [r for r in self["leaderboard"] if r["setting"] == setting]
        row = next((r for r in rows if r["variant"] == variant), None)
        if row is None or len(rows) < 2:
            return about
        parts = [factor(row["l1"])] if len({r["l1"] for r in rows}) > 1 else []
        parts += [seed(row["seed"])] if len({r["seed"] for r in rows}) > 1 else []
        is_alone = sum((r["l1"], r["seed"]) == (row["l1"], row["seed"]) for r in rows) == 1
        return ", ".join(p for p in parts if p) if is_alone and any(parts) else str(variant)

    @property
    def text(self) -> str:
        """How held-out text was read, for headings: ``spans of 16 to 40 documents, windows of 512 tokens``."""
        rows = [r for r in self["scores"] if r["corpus"] and r["metric"] == "token_perplexity" and not r["task"]]
        sizes = sorted({r["num_documents"] for r in rows if is_number(r["num_documents"])})
        lengths = sorted({r["window_tokens"] for r in rows if is_number(r["window_tokens"])})
        few, many = (count(sizes[0]), count(sizes[-1])) if sizes else ("", "")
        said = [f"spans of {few if few == many else f'{few} to {many}'} documents a corpus"] if sizes else []
        said += [f"windows of {' or '.join(map(count, lengths))} tokens"] if lengths else []
        return ", ".join(said)

    @property
    def weighing(self) -> str:
        """How corpora are taken together, for headings."""
        found = {r["weighted_by"] for r in self["leaderboard"]} - {None}
        by = {"mixture": "by their shares of the training mixture", "equal": "each once: their shares are not known"}
        return "; ".join(by[f] for f in sorted(found))

    def against(self, variant: Any, base: Any, **what: Any) -> Record | None:
        """How a variant differs from another on the same documents; None where that was not kept."""
        rows = [r for r in self["differences"] if (r["variant"], r["base"]) == (variant, base)]
        here = {step["artifact"] for step in self["steps"]}
        rows = [r for r in rows if r["base_artifact"] in here]
        return next((r for r in rows if all(r[k] == v for k, v in what.items())), None)

    def main_row(self, setting: str) -> Record:
        """The leaderboard's line of a setting, of the recipe's own last factor and seed where there are several; empty
        if none."""
        rows, own = [r for r in self["leaderboard"] if r["setting"] == setting], last_factor(self.recipe)
        return min(rows, key=lambda r: (is_other(r["l1"], own), *course_order(r, self.recipe.get("seed"))), default={})

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
    recipe = _recipe(runs[0]["recipe_yaml"])
    subjects["courses"] = courses(subjects, recipe.get("seed"))
    subjects["training"] = main_path(subjects, recipe.get("seed"), last_factor(recipe))
    subjects["tradeoff"] = _one_calibration(subjects, recipe)
    return ReportData(runs[0], recipe, subjects, sql)


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


def _one_calibration(subjects: dict[str, list[Record]], recipe: Record) -> list[Record]:
    """The threshold curves of one variant: where a run calibrated several, ProSparse's with the recipe's last factor
    and seed."""
    rows, own = subjects["tradeoff"], last_factor(recipe)
    board = {r["variant"]: r for r in subjects["leaderboard"]}

    def order(row: Record) -> tuple[Any, ...]:
        found = board.get(row["variant"], {})
        of_seed = seed_order(found.get("seed"), recipe.get("seed"))
        return (row["setting"] != "prosparse_star", is_other(found.get("l1"), own), *of_seed, row["variant"])

    chosen = min(rows, key=order, default={}).get("variant")
    return [row for row in rows if row["variant"] == chosen]
