-- What people ask first, derived from the tables. A view is code: it is renewed whenever this file changes.

CREATE MACRO without_nulls(object) AS json_merge_patch('{}', object);
COMMENT ON MACRO without_nulls IS 'A JSON object without its null members.';

CREATE MACRO by_share(value, share, corpus) AS
  CASE WHEN count(share) = count(*) AND sum(share) > 0
       THEN sum(share * value ORDER BY corpus) / sum(share ORDER BY corpus)
       ELSE avg(value ORDER BY corpus) END;
COMMENT ON MACRO by_share IS
  'The mean over corpora, each by its share of the training mixture, as the paper mixes them; each once where a share '
  'is not known. The one way in which corpora are taken together, sparsity and log-perplexity alike.';

CREATE MACRO is_baseline(provider) AS provider IN ('torch', 'dense') OR ends_with(provider, '_dense');
COMMENT ON MACRO is_baseline IS 'Whether an implementation reads every weight: what speedups are measured against.';

CREATE VIEW runs AS
  SELECT s.run_id, s.flow, s.recipe, s.model, coalesce(e.status, 'running') AS status, s.started_at, e.ended_at,
         epoch(e.ended_at - s.started_at) AS wall_s, e.error, s.host, s.pid, s.overrides, s.recipe_yaml, s.provenance
  FROM run_starts s
  LEFT JOIN (FROM run_ends QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY ended_at DESC) = 1) e
    USING (run_id);
COMMENT ON VIEW runs IS 'Every run: when, of which recipe, and how it ended. A run still running has no ended_at.';

CREATE VIEW steps AS
  SELECT s.run_id, s.step_id, s.step, s.stage, s.label, s.fingerprint, e.artifact,
         coalesce(e.status, CASE r.status WHEN 'running' THEN 'running' ELSE 'failed' END) AS status, s.started_at,
         coalesce(e.ended_at, r.ended_at) AS ended_at,
         epoch(coalesce(e.ended_at, r.ended_at) - s.started_at) AS wall_s,
         CASE WHEN e.status IS NULL AND r.status <> 'running' THEN 'the run ended before this step did'
              ELSE e.error END AS error,
         e.hint
  FROM step_starts s JOIN runs r USING (run_id)
  LEFT JOIN (FROM step_ends QUALIFY row_number() OVER (PARTITION BY step_id ORDER BY ended_at DESC) = 1) e
    USING (step_id);
COMMENT ON VIEW steps IS
  'Every step of every run: made (done), taken from the store (cached), running or failed.';

CREATE VIEW variants AS
  SELECT DISTINCT variant, model, source_precision, setting, activation, checkpoint, thresholds, tokens_seen, seed, l1
  FROM variant_facts;
COMMENT ON VIEW variants IS
  'What is measured: a checkpoint with its activation and thresholds; a row of the paper''s tables.';

CREATE VIEW run_artifacts AS
  WITH used AS (
    SELECT DISTINCT run_id, artifact FROM steps WHERE artifact IS NOT NULL AND status IN ('done', 'cached')
    UNION ALL
    SELECT DISTINCT NULL, digest FROM artifacts
    WHERE digest NOT IN (SELECT artifact FROM step_ends WHERE artifact IS NOT NULL)),
  made AS (
    SELECT digest AS artifact, any_value(step) AS step, min(created_at) AS measured_at FROM artifacts GROUP BY digest)
  SELECT u.run_id, r.recipe, r.model, u.artifact, m.step, m.measured_at
  FROM used u LEFT JOIN runs r USING (run_id) JOIN made m USING (artifact);
COMMENT ON VIEW run_artifacts IS
  'Which artifacts a run stands on, made or reused. run_id is NULL for an artifact no run of this ledger used '
  '(after a rebuild).';

CREATE VIEW facts AS
  SELECT artifact, variant, 'evaluation' AS kind, metric AS name, coalesce(task, corpus) AS corpus_or_task, value,
    CASE WHEN higher_is_better THEN 'fraction' WHEN metric LIKE '%perplexity%' THEN 'perplexity'
         WHEN higher_is_better IS FALSE THEN 'score' ELSE 'fraction' END AS unit,
    stderr, n,
    without_nulls(json_object('corpus', corpus, 'num_fewshot', num_fewshot, 'limit', "limit", 'batch_size', batch_size,
      'dtype', dtype, 'harness_version', harness_version, 'window_tokens', window_tokens,
      'num_documents', num_documents, 'note', note)) AS conditions
  FROM evaluations
  UNION ALL BY NAME
  SELECT artifact, variant, 'sparsity' AS kind, m.name, corpus AS corpus_or_task, m.value, m.unit, num_tokens AS n,
    json_object('layers', num_layers, 'threshold', threshold) AS conditions
  FROM (SELECT artifact, variant, corpus, avg(sparsity ORDER BY layer) AS sparsity,
          avg(dead_frac ORDER BY layer) AS dead_frac, avg(mean_abs_x1 ORDER BY layer) AS mean_abs_x1,
          avg(mean_abs_live ORDER BY layer) AS mean_abs_live, avg(chunk_sparsity ORDER BY layer) AS chunk_sparsity,
          avg(threshold ORDER BY layer) AS threshold, count(*) AS num_layers, max(num_tokens) AS num_tokens
        FROM sparsity GROUP BY ALL),
    unnest([{name: 'sparsity', value: sparsity, unit: 'fraction'},
            {name: 'dead_frac', value: dead_frac, unit: 'fraction'},
            {name: 'chunk_sparsity', value: chunk_sparsity, unit: 'fraction'},
            {name: 'mean_abs_x1', value: mean_abs_x1, unit: 'activation'},
            {name: 'mean_abs_live', value: mean_abs_live, unit: 'activation'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'layer_sparsity' AS kind, 'layer_sparsity' AS name, corpus AS corpus_or_task,
    sparsity AS value, 'fraction' AS unit, num_tokens AS n,
    json_object('layer', layer, 'threshold', threshold) AS conditions
  FROM sparsity
  UNION ALL BY NAME
  SELECT artifact, variant, 'threshold' AS kind, m.name, corpus AS corpus_or_task, m.value, m.unit, num_tokens AS n,
    without_nulls(json_object('rule', rule, 'scope', scope, 'threshold', threshold, 'cett', cett,
      'chosen', chosen)) AS conditions
  FROM thresholds,
    unnest([{name: 'token_perplexity', value: perplexity, unit: 'perplexity'},
            {name: 'sparsity', value: sparsity, unit: 'fraction'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'predictor' AS kind, m.name, m.value, 'fraction' AS unit, num_tokens AS n,
    without_nulls(json_object('layers', num_layers, 'cutoff', cutoff, 'hidden', hidden,
      'label_rule', label_rule)) AS conditions
  FROM (SELECT artifact, variant, cutoff, hidden, label_rule, count(*) AS num_layers, max(num_tokens) AS num_tokens,
          avg(recall ORDER BY layer) AS recall, avg(predicted_sparsity ORDER BY layer) AS predicted_sparsity,
          avg(true_sparsity ORDER BY layer) AS true_sparsity
        FROM predictors GROUP BY ALL),
    unnest([{name: 'recall', value: recall}, {name: 'predicted_sparsity', value: predicted_sparsity},
            {name: 'true_sparsity', value: true_sparsity}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, variant, 'speed' AS kind, m.name, kernel AS corpus_or_task, m.value, m.unit, num_reps AS n,
    without_nulls(json_object('kernel', kernel, 'provider', provider, 'd_model', d_model, 'd_ff', d_ff,
      'num_tokens', num_tokens, 'dtype', dtype, 'sparsity', sparsity, 'mask_source', mask_source, 'layer', layer,
      'threads', threads, 'timer', timer, 'cache', cache, 'host', host, 'cpu', cpu, 'device', device,
      'live_frac', live_frac, 'bandwidth_share', bandwidth_share, 'cutoff', cutoff, 'prompt_tokens', prompt_tokens,
      'weights_bytes', weights_bytes, 'cache_bytes', cache_bytes, 'gate_passed', gate_passed, 'rel_err', rel_err,
      'note', note)) AS conditions
  FROM speed,
    unnest([{name: 'p50_us', value: p50_us, unit: 'us'}, {name: 'gbps', value: gbps, unit: 'GB/s'},
            {name: 'tokens_per_s', value: tokens_per_s, unit: 'tokens/s'}]) u(m)
  WHERE m.value IS NOT NULL
  UNION ALL BY NAME
  SELECT artifact, 'training' AS kind, m.name, 'stage ' || stage AS corpus_or_task, m.value, m.unit, tokens AS n,
    json_object('step', step, 'l1_lambda', l1_lambda, 'lr', lr) AS conditions
  FROM (FROM train_metrics QUALIFY row_number() OVER (PARTITION BY artifact, stage ORDER BY step DESC) = 1),
    unnest([{name: 'lm_loss', value: lm_loss, unit: 'nats'},
            {name: 'batch_sparsity', value: sparsity, unit: 'fraction'},
            {name: 'tokens_per_s', value: tokens_per_s, unit: 'tokens/s'}]) u(m)
  WHERE m.value IS NOT NULL;
COMMENT ON VIEW facts IS
  'Every measured number in long form, by the artifact it was measured in; results adds the runs.';

CREATE VIEW results AS
  SELECT r.run_id, r.recipe, coalesce(v.model, r.model) AS model, v.setting, f.variant, f.kind, f.name,
         f.corpus_or_task, f.value, f.unit, f.stderr, f.n, f.conditions::JSON AS conditions, r.measured_at, f.artifact,
         v.source_precision
  FROM facts f JOIN run_artifacts r USING (artifact)
  LEFT JOIN variant_facts v ON (v.artifact, v.variant) = (f.artifact, f.variant);
COMMENT ON VIEW results IS
  'One row per measured number and run: start here. A number reused from the store shows in every run that stands '
  'on it, with the time it was measured.';

CREATE VIEW threshold_tradeoff AS
  SELECT r.run_id, r.recipe, v.model, v.setting, t.variant, t.rule, t.scope, t.corpus, t.threshold, t.sparsity,
         t.perplexity, 100 * (t.perplexity / first_value(t.perplexity) OVER w - 1) AS perplexity_increase_pct,
         t.sparsity - first_value(t.sparsity) OVER w AS sparsity_gain, t.chosen, t.cett, t.stopped_by, t.num_tokens,
         t.artifact
  FROM thresholds t JOIN run_artifacts r USING (artifact)
  JOIN variant_facts v ON (v.artifact, v.variant) = (t.artifact, t.variant)
  WINDOW w AS (PARTITION BY r.run_id, t.artifact, t.variant, t.rule, t.scope, t.corpus ORDER BY t.threshold);
COMMENT ON VIEW threshold_tradeoff IS
  'What each FATReLU threshold costs and brings, against the lowest one tried by the same rule on the same corpus (0).';

CREATE VIEW shrinkage AS
  WITH measured AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, s.*, r.measured_at
    FROM sparsity s JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (s.artifact, s.variant)
    QUALIFY row_number() OVER (
      PARTITION BY r.run_id, v.model, s.variant, s.corpus, s.layer ORDER BY r.measured_at DESC, s.artifact) = 1),
  dense AS (
    SELECT run_id, model, corpus, layer, arg_max(mean_abs_x1, measured_at) AS dense_mean_abs_x1
    FROM measured WHERE setting = 'original' AND mean_abs_x1 > 0 GROUP BY ALL)
  SELECT m.run_id, m.recipe, m.model, m.setting, m.variant, m.corpus, m.layer, m.sparsity, m.chunk_sparsity,
         m.dead_frac, m.mean_abs_live, d.dense_mean_abs_x1, m.mean_abs_live / d.dense_mean_abs_x1 AS survivor_ratio,
         m.num_tokens, m.artifact
  FROM measured m
  LEFT JOIN dense d ON (d.model, d.corpus, d.layer) = (m.model, m.corpus, m.layer)
    AND d.run_id IS NOT DISTINCT FROM m.run_id;
COMMENT ON VIEW shrinkage IS
  'What is left of the activations, by variant, corpus and layer: how large the survivors are beside the dense '
  'activations of the same run, how many neurons died, how many zeros survive in chunks of tokens.';

CREATE VIEW loss_curve AS
  SELECT r.run_id, r.recipe, r.model, t.stage, t.step, t.tokens, t.l1_lambda, t.lr, t.lm_loss, t.l1, t.l1_term,
         t.lm_loss + coalesce(t.l1_term, 0) AS loss, t.distill, t.sparsity, t.mean_abs_x1, t.grad_norm, t.tokens_per_s,
         t.skipped, t.artifact
  FROM train_metrics t JOIN run_artifacts r USING (artifact);
COMMENT ON VIEW loss_curve IS
  'The training curve of a run, stage by stage, with lambda beside the loss it is added to.';

CREATE VIEW speedup AS
  WITH pairs AS (
    SELECT r.run_id, r.recipe, coalesce(v.model, r.model) AS model, v.setting, k.variant, k.kernel, k.provider,
           b.provider AS baseline, k.sparsity, b.p50_us AS baseline_us, k.p50_us, b.p50_us / k.p50_us AS speedup,
           b.p20_us / k.p80_us AS speedup_low, b.p80_us / k.p20_us AS speedup_high, k.byte_ratio, k.byte_ratio_note,
           b.gbps AS baseline_gbps, k.gbps, k.d_model, k.d_ff, k.num_tokens, k.prompt_tokens, k.dtype, k.mask_source,
           k.layer, k.threads, k.timer, k.cache, k.weights_bytes, k.cache_bytes, k.host, k.cpu, k.device, k.rel_err,
           k.live_frac, k.bandwidth_share, k.cutoff, k.artifact,
           CASE WHEN k.layer IS NULL THEN k.sparsity END AS swept -- layers timed one by one count together
    FROM speed k JOIN run_artifacts r USING (artifact)
    JOIN speed b
      ON b.artifact = k.artifact AND b.kernel = k.kernel
      AND is_baseline(b.provider) AND NOT is_baseline(k.provider)
      AND row(b.variant, b.d_model, b.d_ff, b.num_tokens, b.prompt_tokens, b.dtype, b.sparsity, b.mask_source, b.layer,
              b.threads, b.timer, b.cache, b.host, b.cpu, b.device)
        IS NOT DISTINCT FROM
          row(k.variant, k.d_model, k.d_ff, k.num_tokens, k.prompt_tokens, k.dtype, k.sparsity, k.mask_source, k.layer,
              k.threads, k.timer, k.cache, k.host, k.cpu, k.device)
    LEFT JOIN variant_facts v ON (v.artifact, v.variant) = (k.artifact, k.variant)
    WHERE k.gate_passed AND b.gate_passed IS NOT FALSE AND k.p50_us > 0),
  summed AS (
    SELECT *, sum(baseline_us) OVER (
      PARTITION BY run_id, artifact, variant, kernel, provider, baseline, d_model, d_ff, num_tokens, prompt_tokens,
                   dtype, mask_source, threads, timer, cache, host, cpu, device, cutoff, swept) AS whole_us
    FROM pairs),
  ranked AS (
    SELECT *, baseline = first_value(baseline) OVER (
      PARTITION BY run_id, artifact, variant, kernel, provider, d_model, d_ff, num_tokens, prompt_tokens,
                   dtype, mask_source, threads, timer, cache, host, cpu, device, cutoff, swept
      ORDER BY whole_us, baseline) AS is_best
    FROM summed)
  SELECT * EXCLUDE (whole_us, swept, byte_ratio, byte_ratio_note, is_best), is_best,
    CASE WHEN is_best THEN byte_ratio END AS byte_ratio, CASE WHEN is_best THEN byte_ratio_note END AS byte_ratio_note,
    CASE WHEN is_best THEN speedup > byte_ratio END AS above_byte_ratio,
    CASE WHEN is_best AND speedup > byte_ratio
         THEN 'above its byte ratio' || coalesce(printf(': it reads %.1f GB/s, its baseline %.1f', gbps, baseline_gbps), '')
           || CASE WHEN speedup_low <= byte_ratio THEN '; within the spread of the timings' ELSE '' END END AS above_byte_ratio_note
  FROM ranked;
COMMENT ON VIEW speedup IS
  'Speedup over each dense baseline (torch, or our own dense kernel) of the same session under the very same '
  'conditions, and only for kernels that passed their correctness gate. is_best marks the fastest of them, the one that '
  'tables, plots and the closing line of a run show; the byte ratio stands beside that one alone.';

CREATE VIEW decode_tradeoff AS
  WITH price AS (
    SELECT artifact, variant, try_cast(regexp_extract(task, 'cutoff (.+)$', 1) AS DOUBLE) AS cutoff, value
    FROM evaluations
    WHERE metric = 'predicted_perplexity' AND (task = 'predictor/exact' OR task LIKE 'predictor/cutoff %')),
  found AS (
    SELECT artifact, variant, cutoff, avg(recall ORDER BY layer) AS recall,
           avg(predicted_sparsity ORDER BY layer) AS predicted_sparsity
    FROM predictors WHERE label_rule IS NULL OR label_rule NOT LIKE '%, against %' GROUP BY ALL)
  SELECT r.run_id, r.recipe, coalesce(v.model, r.model) AS model, v.setting, k.variant, k.provider, k.dtype, k.cutoff,
         f.recall, f.predicted_sparsity, k.live_frac, x.value AS perplexity,
         100 * (x.value / e.value - 1) AS perplexity_increase_pct, k.p50_us, k.tokens_per_s,
         k.prompt_tokens, d.p50_us / k.p50_us AS decode_over_dense, k.gate_passed, k.threads, k.timer, k.cpu,
         k.artifact
  FROM speed k JOIN run_artifacts r USING (artifact)
  LEFT JOIN variant_facts v ON (v.artifact, v.variant) = (k.artifact, k.variant)
  LEFT JOIN speed d
    ON (d.artifact, d.variant, d.kernel, d.provider, d.dtype, d.mask_source)
      = (k.artifact, k.variant, 'decode', 'native_dense', k.dtype, k.mask_source)
    AND d.prompt_tokens IS NOT DISTINCT FROM k.prompt_tokens
  LEFT JOIN lineage l ON l.artifact = k.artifact AND l.role = 'predictors'
  LEFT JOIN price x
    ON x.artifact = l.input AND x.variant = k.variant AND x.cutoff IS NOT DISTINCT FROM k.cutoff
    AND k.dtype IN ('float32', 'fp32')
  LEFT JOIN price e ON e.artifact = l.input AND e.variant = k.variant AND e.cutoff IS NULL
  LEFT JOIN found f ON f.artifact = l.input AND f.variant = k.variant AND f.cutoff = k.cutoff
  WHERE k.kernel = 'decode' AND k.mask_source = 'recorded';
COMMENT ON VIEW decode_tradeoff IS
  'Perplexity beside decoding speed: dense, exact and certified loops, which compute the same, and a predictor at each '
  'of its cutoffs, which does not. Perplexities are those that the timed predictors were measured with, of float32 '
  'weights; of others they are not known.';

CREATE VIEW dropped AS
  SELECT artifact, path, bytes, happened_at, reason
  FROM (FROM retention QUALIFY row_number() OVER (PARTITION BY artifact, path ORDER BY happened_at DESC, rowid DESC) = 1)
  WHERE event = 'dropped';
COMMENT ON VIEW dropped IS
  'Files that artifacts no longer hold: what was taken away by a retention rule, and why. What was measured stays valid.';

CREATE MACRO lineage_of(root) AS TABLE
  WITH RECURSIVE ancestry(digest, depth, role) AS (
    SELECT DISTINCT digest, 0, NULL::VARCHAR FROM artifacts WHERE starts_with(digest, root)
    UNION
    SELECT l.input, a.depth + 1, l.role FROM ancestry a JOIN lineage l ON l.artifact = a.digest WHERE a.depth < 100)
  SELECT min(n.depth) AS depth, string_agg(DISTINCT n.role, ', ' ORDER BY n.role) AS role, any_value(a.step) AS step,
         any_value(a.label) AS label, n.digest AS artifact, any_value(a.path) AS path, min(a.created_at) AS created_at,
         (SELECT string_agg(d.path, ', ' ORDER BY d.path) FROM dropped d WHERE d.artifact = n.digest) AS dropped
  FROM ancestry n LEFT JOIN artifacts a ON a.digest = n.digest GROUP BY n.digest ORDER BY depth, step, n.digest;
COMMENT ON MACRO TABLE lineage_of IS
  'Everything an artifact was made from, back to the source; give its digest or the beginning of it.';
