-- Every derived number of the ledger. A view is code: it is renewed whenever this file changes.

CREATE MACRO without_nulls(object) AS json_merge_patch('{}', object);
COMMENT ON MACRO without_nulls IS 'A JSON object without its null members.';

CREATE VIEW runs AS
  SELECT s.run_id, s.flow, s.recipe, s.model, coalesce(e.status, 'running') AS status, s.started_at, e.ended_at,
         epoch(e.ended_at - s.started_at) AS wall_s, e.error, s.host, s.pid, s.overrides, s.recipe_yaml, s.provenance
  FROM run_starts s
  LEFT JOIN (SELECT * FROM run_ends QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY ended_at DESC) = 1) e
    USING (run_id);
COMMENT ON VIEW runs IS 'Every run: when, of which recipe, and how it ended. A run still running has no ended_at.';

CREATE VIEW steps AS
  SELECT s.run_id, s.step_id, s.step, s.stage, s.label, s.fingerprint, e.artifact,
         coalesce(e.status, if(r.status = 'running', 'running', 'failed')) AS status, s.started_at,
         coalesce(e.ended_at, r.ended_at) AS ended_at,
         epoch(coalesce(e.ended_at, r.ended_at) - s.started_at) AS wall_s,
         coalesce(e.error, if(e.status IS NULL AND r.status <> 'running', 'the run ended before this step did', NULL)) AS error,
         e.hint
  FROM step_starts s JOIN runs r USING (run_id)
  LEFT JOIN (SELECT * FROM step_ends QUALIFY row_number() OVER (PARTITION BY step_id ORDER BY ended_at DESC) = 1) e
    USING (step_id);
COMMENT ON VIEW steps IS 'Every step of every run: made (done), taken from the store (cached), running or failed.';

CREATE VIEW variants AS
  SELECT DISTINCT variant, model, setting, activation, checkpoint, thresholds, tokens_seen FROM variant_facts;
COMMENT ON VIEW variants IS 'What is measured: a checkpoint with its activation and thresholds; a row of the paper''s tables.';

CREATE VIEW run_artifacts AS
  WITH used AS (
    SELECT DISTINCT run_id, artifact FROM steps WHERE artifact IS NOT NULL AND status IN ('done', 'cached')
    UNION ALL
    SELECT DISTINCT NULL, digest FROM artifacts WHERE digest NOT IN (SELECT artifact FROM step_ends WHERE artifact IS NOT NULL))
  SELECT u.run_id, r.recipe, r.model, u.artifact, a.step, a.measured_at
  FROM used u LEFT JOIN runs r USING (run_id)
  JOIN (SELECT digest, any_value(step) AS step, min(created_at) AS measured_at FROM artifacts GROUP BY digest) a
    ON a.digest = u.artifact;
COMMENT ON VIEW run_artifacts IS 'Which artifacts a run stands on, made or reused. run_id is NULL for an artifact no run of this ledger used (after a rebuild).';

CREATE VIEW facts AS
  SELECT artifact, variant, 'evaluation' AS kind, metric AS name, coalesce(task, corpus) AS corpus_or_task, value,
         if(metric LIKE '%perplexity%', 'perplexity', if(higher_is_better IS FALSE, 'as printed', 'fraction')) AS unit,
         stderr, n, without_nulls(json_object('corpus', corpus, 'num_fewshot', num_fewshot, 'limit', "limit",
           'batch_size', batch_size, 'dtype', dtype, 'harness_version', harness_version, 'note', note)) AS conditions
  FROM evaluations
  UNION ALL BY NAME
  SELECT artifact, variant, 'sparsity' AS kind, m.name, corpus AS corpus_or_task, m.value, m.unit, NULL AS stderr,
         num_tokens AS n, json_object('layers', num_layers, 'threshold', threshold) AS conditions
  FROM (SELECT artifact, variant, corpus, avg(sparsity) AS sparsity, avg(dead_frac) AS dead_frac,
          avg(mean_abs_x1) AS mean_abs_x1, avg(threshold) AS threshold, count(*) AS num_layers, max(num_tokens) AS num_tokens
        FROM sparsity GROUP BY ALL),
       unnest([{name: 'sparsity', value: sparsity, unit: 'fraction'}, {name: 'dead_frac', value: dead_frac, unit: 'fraction'},
               {name: 'mean_abs_x1', value: mean_abs_x1, unit: 'activation'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'layer_sparsity' AS kind, 'layer_sparsity' AS name, corpus AS corpus_or_task, sparsity AS value,
         'fraction' AS unit, NULL AS stderr, num_tokens AS n, json_object('layer', layer, 'threshold', threshold) AS conditions
  FROM sparsity
  UNION ALL BY NAME
  SELECT artifact, variant, 'threshold' AS kind, m.name, corpus AS corpus_or_task, m.value, m.unit, NULL AS stderr,
         num_tokens AS n, json_object('rule', rule, 'scope', scope, 'threshold', threshold, 'chosen', chosen) AS conditions
  FROM thresholds, unnest([{name: 'token_perplexity', value: perplexity, unit: 'perplexity'},
                           {name: 'sparsity', value: sparsity, unit: 'fraction'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'predictor' AS kind, m.name, NULL AS corpus_or_task, m.value, 'fraction' AS unit, NULL AS stderr,
         num_tokens AS n, json_object('layers', num_layers, 'cutoff', cutoff, 'hidden', hidden, 'label_rule', label_rule) AS conditions
  FROM (SELECT artifact, variant, cutoff, hidden, label_rule, count(*) AS num_layers, max(num_tokens) AS num_tokens,
          avg(recall) AS recall, avg(predicted_sparsity) AS predicted_sparsity, avg(true_sparsity) AS true_sparsity
        FROM predictors GROUP BY ALL),
       unnest([{name: 'recall', value: recall}, {name: 'predicted_sparsity', value: predicted_sparsity},
               {name: 'true_sparsity', value: true_sparsity}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'speed' AS kind, m.name, kernel AS corpus_or_task, m.value, m.unit, NULL AS stderr, num_reps AS n,
         without_nulls(json_object('kernel', kernel, 'provider', provider, 'd_model', d_model, 'd_ff', d_ff,
           'num_tokens', num_tokens, 'dtype', dtype, 'sparsity', sparsity, 'mask_source', mask_source, 'layer', layer,
           'threads', threads, 'timer', timer, 'cache', cache, 'host', host, 'cpu', cpu, 'device', device,
           'gate_passed', gate_passed, 'rel_err', rel_err, 'note', note)) AS conditions
  FROM speed, unnest([{name: 'p50_us', value: p50_us, unit: 'us'}, {name: 'gbps', value: gbps, unit: 'GB/s'},
                      {name: 'tokens_per_s', value: tokens_per_s, unit: 'tokens/s'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, NULL AS variant, 'training' AS kind, m.name, 'stage ' || stage AS corpus_or_task, m.value, m.unit,
         NULL AS stderr, tokens AS n, json_object('step', step, 'l1_lambda', l1_lambda, 'lr', lr) AS conditions
  FROM (SELECT * FROM train_metrics QUALIFY row_number() OVER (PARTITION BY artifact, stage ORDER BY step DESC) = 1),
       unnest([{name: 'lm_loss', value: lm_loss, unit: 'nats'}, {name: 'batch_sparsity', value: sparsity, unit: 'fraction'},
               {name: 'tokens_per_s', value: tokens_per_s, unit: 'tokens/s'}]) u(m)
  WHERE m.value IS NOT NULL;
COMMENT ON VIEW facts IS 'Every measured number in long form, by the artifact it was measured in; results adds the runs.';

CREATE VIEW results AS
  SELECT r.run_id, r.recipe, coalesce(v.model, r.model) AS model, v.setting, f.variant, f.kind, f.name, f.corpus_or_task,
         f.value, f.unit, f.stderr, f.n, f.conditions::JSON AS conditions, r.measured_at, f.artifact
  FROM facts f JOIN run_artifacts r USING (artifact)
  LEFT JOIN variant_facts v ON (v.artifact, v.variant) = (f.artifact, f.variant);
COMMENT ON VIEW results IS 'One row per measured number and run: start here. A number reused from the store shows in every run that stands on it, with the time it was measured.';

CREATE VIEW benchmarks AS
  WITH scores AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, e.variant, e.task, split_part(e.metric, ',', 1) AS metric, e.metric AS exact_metric,
           e.value, e.n, e."limit" IS NOT NULL AS partial, r.measured_at, coalesce(e.headline, FALSE) AS headline,
           CASE WHEN e.task = 'mmlu' OR e.task LIKE 'mmlu\_%' ESCAPE '\' AND e.task NOT LIKE 'mmlu\_pro%' ESCAPE '\' THEN 'mmlu'
                WHEN e.task = 'bbh' OR e.task LIKE 'bbh\_%' ESCAPE '\' THEN 'bbh'
                WHEN e.task = 'agieval' OR e.task LIKE 'agieval\_%' ESCAPE '\' THEN 'agieval'
                WHEN e.task LIKE 'tydiqa%' THEN 'tydiqa' WHEN e.task LIKE 'lambada%' THEN 'lambada'
                WHEN e.task = 'social_iqa' THEN 'siqa' ELSE e.task END AS benchmark,
           e.task IN ('mmlu', 'bbh', 'bbh_fewshot', 'agieval', 'agieval_en') AS is_group
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.task IS NOT NULL AND e.value IS NOT NULL AND e.metric NOT LIKE '%perplexity%'),
  chosen AS (
    SELECT * FROM scores
    WHERE headline OR metric IN ('acc', 'exact_match', 'pass@1', 'pass_at_1', 'acc_norm', 'f1')
    QUALIFY row_number() OVER (PARTITION BY run_id, model, variant, task ORDER BY headline DESC, partial, measured_at DESC,
      list_position(['acc', 'exact_match', 'pass@1', 'pass_at_1', 'acc_norm', 'f1'], metric), exact_metric DESC) = 1)
  SELECT run_id, recipe, model, setting, variant,
         CASE WHEN benchmark IN ('humaneval', 'mbpp') THEN 'code'
              WHEN benchmark IN ('piqa', 'siqa', 'hellaswag', 'winogrande', 'copa') THEN 'commonsense'
              WHEN benchmark IN ('boolq', 'lambada', 'tydiqa') THEN 'reading' ELSE benchmark END AS suite,
         benchmark, string_agg(DISTINCT exact_metric, ' ') AS metric,
         coalesce(avg(value) FILTER (is_group), avg(value)) AS value,
         coalesce(sum(n) FILTER (is_group), sum(n)) AS n, bool_or(partial) AS partial, max(measured_at) AS measured_at
  FROM chosen GROUP BY ALL;
COMMENT ON VIEW benchmarks IS 'One score per run, variant and benchmark: the metric marked headline, else acc, exact_match, pass@1, acc_norm, f1 in this order; sub-tasks averaged where no group score exists. Suites are the columns of the paper''s Table 1.';

CREATE VIEW leaderboard AS
  WITH measured AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, v.variant, any_value(v.tokens_seen) AS tokens_seen
    FROM run_artifacts r JOIN variant_facts v USING (artifact) GROUP BY ALL),
  perplexities AS (
    SELECT r.run_id, v.model, e.variant, e.corpus, e.value, e.n
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.metric = 'token_perplexity' AND e.corpus IS NOT NULL AND e.value IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY r.run_id, v.model, e.variant, e.corpus
                               ORDER BY e."limit" IS NOT NULL, r.measured_at DESC, e.artifact) = 1),
  perplexity AS (
    SELECT run_id, model, variant,
      coalesce(any_value(value) FILTER (corpus = 'mixed'), CASE WHEN count(n) = count(*)
        THEN exp(sum(n * ln(value)) / sum(n)) ELSE exp(avg(ln(value))) END) AS perplexity,
      map_from_entries(list((corpus, value) ORDER BY corpus)) AS perplexity_by_corpus
    FROM perplexities GROUP BY ALL),
  sparsities AS (
    SELECT r.run_id, v.model, s.variant, s.corpus, avg(s.sparsity) AS sparsity, avg(s.threshold) AS threshold
    FROM sparsity s JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (s.artifact, s.variant)
    GROUP BY r.run_id, v.model, s.variant, s.corpus, s.artifact, r.measured_at
    QUALIFY row_number() OVER (PARTITION BY r.run_id, v.model, s.variant, s.corpus ORDER BY r.measured_at DESC, s.artifact) = 1),
  zeros AS (
    SELECT run_id, model, variant, avg(threshold) AS threshold,
      coalesce(any_value(sparsity) FILTER (corpus = 'mixed'), avg(sparsity)) AS sparsity,
      map_from_entries(list((corpus, sparsity) ORDER BY corpus)) AS sparsity_by_corpus
    FROM sparsities GROUP BY ALL),
  suites AS (
    SELECT run_id, model, variant, suite, avg(value) AS value, count(*) AS num_benchmarks, sum(value) AS total, bool_or(partial) AS partial
    FROM benchmarks GROUP BY ALL),
  scores AS (
    SELECT run_id, model, variant, sum(total) / sum(num_benchmarks) AS accuracy, sum(num_benchmarks)::BIGINT AS num_benchmarks,
      bool_or(partial) AS partial,
      max(value) FILTER (suite = 'code') AS code, max(value) FILTER (suite = 'commonsense') AS commonsense,
      max(value) FILTER (suite = 'reading') AS reading, max(value) FILTER (suite = 'gsm8k') AS gsm8k,
      max(value) FILTER (suite = 'mmlu') AS mmlu, max(value) FILTER (suite = 'bbh') AS bbh,
      max(value) FILTER (suite = 'agieval') AS agieval
    FROM suites GROUP BY ALL),
  absent AS (
    SELECT r.run_id, v.model, e.variant, list(DISTINCT coalesce(e.task, e.corpus) || ': ' || e.note) AS not_measured
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.value IS NULL GROUP BY ALL)
  SELECT m.run_id, m.recipe, m.model, m.setting, z.sparsity, p.perplexity, s.accuracy, s.num_benchmarks, s.partial, z.threshold,
         z.sparsity_by_corpus, p.perplexity_by_corpus, s.code, s.commonsense, s.reading, s.gsm8k, s.mmlu, s.bbh, s.agieval,
         (s.code + s.commonsense + s.reading + s.gsm8k + s.mmlu + s.bbh + s.agieval) / 7 AS average,
         a.not_measured, m.tokens_seen, m.variant
  FROM measured m
  LEFT JOIN zeros z ON (z.model, z.variant) = (m.model, m.variant) AND z.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN perplexity p ON (p.model, p.variant) = (m.model, m.variant) AND p.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN scores s ON (s.model, s.variant) = (m.model, m.variant) AND s.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN absent a ON (a.model, a.variant) = (m.model, m.variant) AND a.run_id IS NOT DISTINCT FROM m.run_id;
COMMENT ON VIEW leaderboard IS 'The paper''s columns from our own rows: one line per run and variant. Where something was measured twice in a run, the complete and then the newest measurement counts.';

CREATE VIEW threshold_tradeoff AS
  SELECT r.run_id, r.recipe, v.model, v.setting, t.variant, t.rule, t.scope, t.corpus, t.threshold, t.sparsity, t.perplexity,
         100 * (t.perplexity / first_value(t.perplexity) OVER w - 1) AS perplexity_increase_pct,
         t.sparsity - first_value(t.sparsity) OVER w AS sparsity_gain, t.chosen, t.num_tokens, t.artifact
  FROM thresholds t JOIN run_artifacts r USING (artifact)
  JOIN variant_facts v ON (v.artifact, v.variant) = (t.artifact, t.variant)
  WINDOW w AS (PARTITION BY r.run_id, t.artifact, t.variant, t.rule, t.scope, t.corpus ORDER BY t.threshold);
COMMENT ON VIEW threshold_tradeoff IS 'What each FATReLU threshold costs and brings, against the lowest one tried on the same corpus (0).';

CREATE VIEW loss_curve AS
  SELECT r.run_id, r.recipe, r.model, t.stage, t.step, t.tokens, t.l1_lambda, t.lr, t.lm_loss, t.l1, t.l1_term,
         t.lm_loss + coalesce(t.l1_term, 0) AS loss, t.sparsity, t.mean_abs_x1, t.grad_norm, t.tokens_per_s, t.artifact
  FROM train_metrics t JOIN run_artifacts r USING (artifact);
COMMENT ON VIEW loss_curve IS 'The training curve of a run, stage by stage, with lambda beside the loss it is added to.';

CREATE VIEW speedup AS
  SELECT r.run_id, r.recipe, coalesce(v.model, r.model) AS model, v.setting, k.variant, k.kernel, k.provider, b.provider AS baseline,
         k.sparsity, b.p50_us AS baseline_us, k.p50_us, b.p50_us / k.p50_us AS speedup, b.p20_us / k.p80_us AS speedup_low,
         b.p80_us / k.p20_us AS speedup_high, k.limit_speedup, k.d_model, k.d_ff, k.num_tokens, k.dtype, k.mask_source, k.layer,
         k.threads, k.timer, k.cache, k.host, k.cpu, k.device, k.rel_err, k.artifact
  FROM speed k JOIN run_artifacts r USING (artifact)
  JOIN speed b ON b.artifact = k.artifact AND b.provider IN ('torch', 'dense') AND k.provider <> b.provider
    AND k.provider NOT IN ('torch', 'dense') AND b.kernel = k.kernel
    AND row(b.variant, b.d_model, b.d_ff, b.num_tokens, b.dtype, b.sparsity, b.mask_source, b.layer, b.threads, b.timer, b.cache,
            b.host, b.cpu, b.device)
      IS NOT DISTINCT FROM
        row(k.variant, k.d_model, k.d_ff, k.num_tokens, k.dtype, k.sparsity, k.mask_source, k.layer, k.threads, k.timer, k.cache,
            k.host, k.cpu, k.device)
  LEFT JOIN variant_facts v ON (v.artifact, v.variant) = (k.artifact, k.variant)
  WHERE k.gate_passed AND b.gate_passed IS NOT FALSE AND k.p50_us > 0;
COMMENT ON VIEW speedup IS 'Speedup over the dense baseline (provider torch or dense) of the same session under the very same conditions, and only for kernels that passed their correctness gate.';

CREATE MACRO paper_model(model) AS
  CASE WHEN regexp_matches(lower(model), 'llama-?2.*13b') THEN 'llama2-13b' WHEN regexp_matches(lower(model), 'llama-?2.*7b') THEN 'llama2-7b'
       WHEN regexp_matches(lower(model), 'minicpm.*1b') THEN 'minicpm-1b' END;
COMMENT ON MACRO paper_model IS 'The name a model has in published, or NULL when the paper does not treat it.';

CREATE VIEW paper_gap AS
  WITH long AS (
    SELECT run_id, recipe, model, setting, variant, m.metric, 100 * m.value AS value
    FROM leaderboard, unnest([{metric: 'sparsity_pct', value: sparsity}, {metric: 'code_pct', value: code},
      {metric: 'commonsense_pct', value: commonsense}, {metric: 'reading_pct', value: reading}, {metric: 'gsm8k_pct', value: gsm8k},
      {metric: 'mmlu_pct', value: mmlu}, {metric: 'bbh_pct', value: bbh}, {metric: 'agieval_pct', value: agieval},
      {metric: 'average_pct', value: average}]) u(m)
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, 'sparsity_pct/' || e.key AS metric, 100 * e.value AS value
    FROM leaderboard, unnest(map_entries(sparsity_by_corpus)) u(e) WHERE e.key <> 'mixed'
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, benchmark || '_pct' AS metric, 100 * value AS value
    FROM benchmarks WHERE benchmark <> suite
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, name || '_pct' AS metric, 100 * value AS value
    FROM results WHERE kind = 'predictor' AND name IN ('recall', 'predicted_sparsity') AND (conditions->>'cutoff')::DOUBLE = 0.5
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, kernel || '_speedup' AS metric, max(speedup) AS value
    FROM speedup WHERE kernel IN ('s2', 's3', 'decode') AND variant IS NOT NULL GROUP BY ALL),
  ours AS (SELECT * FROM long WHERE value IS NOT NULL AND setting IS NOT NULL),
  paper AS (
    SELECT * FROM published WHERE condition = ''
    QUALIFY row_number() OVER (PARTITION BY model, setting, metric ORDER BY source) = 1)
  SELECT o.run_id, o.recipe, o.model, o.setting, o.metric, o.value AS ours, p.value AS paper,
         if(paper_model(o.model) IS NULL, NULL, o.value - p.value) AS gap, p.model AS paper_model, p.source, o.variant
  FROM ours o LEFT JOIN paper p
    ON p.model = coalesce(paper_model(o.model), 'llama2-7b') AND p.setting = o.setting AND lower(p.metric) = lower(o.metric)
  UNION ALL BY NAME
  SELECT p.model, p.setting, p.metric, p.value AS paper, p.model AS paper_model, p.source
  FROM paper p WHERE NOT EXISTS (
    SELECT 1 FROM ours o WHERE paper_model(o.model) = p.model AND o.setting = p.setting AND lower(o.metric) = lower(p.metric));
COMMENT ON VIEW paper_gap IS 'Our numbers beside the published ones, both in per cent (speedups as ratios). A model the paper does not treat stands beside LLaMA2-7B, without a gap; a published number nobody measured here has ours NULL.';

CREATE MACRO lineage_of(root) AS TABLE
  WITH RECURSIVE ancestry(digest, depth, role) AS (
    SELECT DISTINCT digest, 0, NULL::VARCHAR FROM artifacts WHERE starts_with(digest, root)
    UNION
    SELECT l.input, a.depth + 1, l.role FROM ancestry a JOIN lineage l ON l.artifact = a.digest WHERE a.depth < 100)
  SELECT min(n.depth) AS depth, string_agg(DISTINCT n.role, ', ' ORDER BY n.role) AS role, any_value(a.step) AS step,
         any_value(a.label) AS label, n.digest AS artifact, any_value(a.path) AS path, min(a.created_at) AS created_at
  FROM ancestry n LEFT JOIN artifacts a ON a.digest = n.digest GROUP BY n.digest ORDER BY depth, step, n.digest;
COMMENT ON MACRO TABLE lineage_of IS 'Everything an artifact was made from, back to the source; give its digest or the beginning of it.';
