-- The paper's tables from our own rows, and beside the published ones.

CREATE MACRO benchmark_of(task) AS
  CASE WHEN task = 'mmlu' OR (task LIKE 'mmlu\_%' ESCAPE '\' AND task NOT LIKE 'mmlu\_pro%' ESCAPE '\') THEN 'mmlu'
       WHEN task = 'bbh' OR task LIKE 'bbh\_%' ESCAPE '\' THEN 'bbh'
       WHEN task = 'agieval' OR task LIKE 'agieval\_%' ESCAPE '\' THEN 'agieval'
       WHEN task LIKE 'tydiqa%' THEN 'tydiqa'
       WHEN task LIKE 'lambada%' THEN 'lambada'
       WHEN task = 'social_iqa' THEN 'siqa'
       ELSE task END;
COMMENT ON MACRO benchmark_of IS 'The benchmark that a task of lm-eval counts into.';

CREATE MACRO members_of(suite) AS
  CASE suite WHEN 'code' THEN ['humaneval', 'mbpp']
             WHEN 'commonsense' THEN ['piqa', 'siqa', 'hellaswag', 'winogrande', 'copa']
             WHEN 'reading' THEN ['boolq', 'lambada', 'tydiqa']
             ELSE [suite] END;
COMMENT ON MACRO members_of IS 'The benchmarks that a column of the paper''s Table 1 is the mean of.';

CREATE VIEW benchmarks AS
  WITH scores AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, e.variant, e.task, e.metric AS exact_metric,
      split_part(e.metric, ',', 1) AS metric, e.value, e.stderr, e.n, e."limit" IS NOT NULL AS partial, r.measured_at,
      coalesce(e.headline, FALSE) AS headline,
      benchmark_of(e.task) AS benchmark,
      e.task IN ('mmlu', 'bbh', 'bbh_fewshot', 'agieval', 'agieval_en') AS is_group
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.task IS NOT NULL AND e.value IS NOT NULL AND e.higher_is_better IS NOT FALSE),
  chosen AS (
    SELECT * FROM scores
    WHERE headline OR metric IN ('acc', 'exact_match', 'pass@1', 'pass_at_1', 'acc_norm', 'f1')
    QUALIFY row_number() OVER (
      PARTITION BY run_id, model, variant, task
      ORDER BY headline DESC, partial, measured_at DESC,
        list_position(['acc', 'exact_match', 'pass@1', 'pass_at_1', 'acc_norm', 'f1'], metric), exact_metric DESC) = 1),
  absent AS (
    SELECT r.run_id, v.model, e.variant, benchmark_of(e.task) AS benchmark,
      list_sort(list(DISTINCT e.task)) AS not_measured
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.task IS NOT NULL AND e.value IS NULL GROUP BY ALL),
  grouped AS (
    SELECT run_id, recipe, model, setting, variant, benchmark, string_agg(DISTINCT exact_metric, ' ') AS metric,
      coalesce(avg(value ORDER BY task) FILTER (is_group), avg(value ORDER BY task)) AS value,
      CASE WHEN bool_or(is_group)
           THEN CASE WHEN count(stderr) FILTER (is_group) = count(*) FILTER (is_group)
                     THEN sqrt(sum(stderr^2 ORDER BY task) FILTER (is_group)) / count(*) FILTER (is_group) END
           WHEN count(stderr) = count(*) THEN sqrt(sum(stderr^2 ORDER BY task)) / count(*) END AS stderr,
      coalesce(sum(n) FILTER (is_group), sum(n)) AS n,
      bool_or(partial) AS partial, max(measured_at) AS measured_at
    FROM chosen GROUP BY ALL)
  SELECT g.run_id, g.recipe, g.model, g.setting, g.variant,
    coalesce((SELECT s FROM unnest(['code', 'commonsense', 'reading']) u(s) WHERE g.benchmark IN members_of(s)),
             g.benchmark) AS suite,
    g.benchmark, g.metric, g.value, g.stderr, g.n, g.partial, coalesce(a.not_measured, []) AS not_measured, g.measured_at
  FROM grouped g LEFT JOIN absent a
    ON (a.model, a.variant, a.benchmark) = (g.model, g.variant, g.benchmark) AND a.run_id IS NOT DISTINCT FROM g.run_id;
COMMENT ON VIEW benchmarks IS
  'One score per run, variant and benchmark: the metric marked headline, else acc, exact_match, pass@1, acc_norm, f1 '
  'in this order; sub-tasks are averaged where no group score exists. Suites are the columns of the paper''s Table 1.';

CREATE VIEW suites AS
  WITH means AS (
    SELECT run_id, recipe, model, setting, variant, suite, avg(value ORDER BY benchmark) AS value,
      CASE WHEN count(stderr) = count(*) THEN sqrt(sum(stderr^2 ORDER BY benchmark)) / count(*) END AS stderr,
      sum(n)::BIGINT AS n, count(*) AS num_benchmarks, bool_or(partial) AS partial, list(benchmark) AS measured,
      list_sort(flatten(list(not_measured))) AS tasks_without
    FROM benchmarks GROUP BY ALL)
  SELECT * EXCLUDE (measured, tasks_without),
    list_concat(list_filter(members_of(suite), lambda b: NOT list_contains(measured, b)), tasks_without) AS not_measured
  FROM means;
COMMENT ON VIEW suites IS
  'One score per run, variant and column of the paper''s Table 1: the unweighted mean of the benchmarks measured of it. '
  'What not_measured names is missing from the mean: only with nothing there is it the paper''s column.';

CREATE VIEW paired AS
  SELECT * FROM differences
  UNION ALL BY NAME
  SELECT base_artifact AS artifact, base AS variant, artifact AS base_artifact, variant AS base, task, corpus, metric,
    unit, CASE unit WHEN 'ratio' THEN 1 / value ELSE -value END AS value,
    CASE unit WHEN 'ratio' THEN 1 / high ELSE -high END AS low,
    CASE unit WHEN 'ratio' THEN 1 / low ELSE -low END AS high, stderr, num_documents, note
  FROM differences;
COMMENT ON VIEW paired IS 'differences from either side, whatever runs the two were measured in.';

CREATE VIEW variant_differences AS
  SELECT r.run_id, r.recipe, v.model, v.setting, d.variant, w.setting AS base_setting, d.base, d.task, d.corpus,
    d.metric, d.unit, d.value, d.low, d.high, d.stderr, d.num_documents, d.note, d.artifact, d.base_artifact
  FROM paired d JOIN run_artifacts r ON r.artifact = d.artifact
  JOIN run_artifacts b ON b.artifact = d.base_artifact AND b.run_id IS NOT DISTINCT FROM r.run_id
  JOIN variant_facts v ON (v.artifact, v.variant) = (d.artifact, d.variant)
  JOIN variant_facts w ON (w.artifact, w.variant) = (d.base_artifact, d.base)
  QUALIFY row_number() OVER (
    PARTITION BY r.run_id, d.variant, d.base, d.task, d.corpus, d.metric
    ORDER BY r.measured_at DESC, b.measured_at DESC, d.artifact, d.base_artifact) = 1;
COMMENT ON VIEW variant_differences IS
  'How the variants of a run differ from each other on the same documents, with 95 % intervals from a paired bootstrap '
  'by document: perplexities as ratios, scores as differences. WHERE base_setting = ''original'' is the table of '
  'results.';

CREATE VIEW corpus_shares AS
  SELECT artifact, corpus, any_value(share) AS share FROM evaluations
  WHERE corpus IS NOT NULL AND share IS NOT NULL GROUP BY ALL;
COMMENT ON VIEW corpus_shares IS
  'The share of each corpus in the training mixture behind an evaluation, as the manifest has it: what by_share weighs.';

CREATE VIEW leaderboard AS
  WITH measured AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, v.variant, any_value(v.tokens_seen) AS tokens_seen,
      any_value(v.seed) AS seed, any_value(v.l1) AS l1, any_value(v.source_precision) AS source_precision
    FROM run_artifacts r JOIN variant_facts v USING (artifact) GROUP BY ALL),
  perplexities AS (
    SELECT r.run_id, v.model, e.variant, e.corpus, e.value, e.stderr, e.share, e.window_tokens, e.num_documents
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.metric = 'token_perplexity' AND e.corpus IS NOT NULL AND e.value IS NOT NULL
      AND coalesce(e.task, '') NOT LIKE 'calibration/%' -- other files: thresholds were chosen on them
    QUALIFY row_number() OVER (
      PARTITION BY r.run_id, v.model, e.variant, e.corpus
      ORDER BY e."limit" IS NOT NULL, r.measured_at DESC, e.artifact) = 1),
  perplexity AS (
    SELECT run_id, model, variant,
      CASE WHEN bool_or(corpus = 'mixed') THEN any_value(value) FILTER (corpus = 'mixed')
           ELSE exp(by_share(ln(value), share, corpus)) END AS perplexity,
      -- Delta method: a relative error of perplexity is an absolute one of its logarithm, which is what is averaged.
      CASE WHEN bool_or(corpus = 'mixed') THEN any_value(stderr / value) FILTER (corpus = 'mixed')
           WHEN count(stderr) < count(*) THEN NULL
           WHEN count(share) = count(*) AND sum(share) > 0
           THEN sqrt(sum((share * stderr / value)^2 ORDER BY corpus)) / sum(share ORDER BY corpus)
           ELSE sqrt(sum((stderr / value)^2 ORDER BY corpus)) / count(*) END AS relative_error,
      CASE WHEN count(*) = 1 OR bool_or(corpus = 'mixed') THEN NULL
           WHEN count(share) = count(*) AND sum(share) > 0 THEN 'mixture' ELSE 'equal' END AS weighted_by,
      CASE WHEN min(window_tokens) = max(window_tokens) THEN min(window_tokens) END AS window_tokens,
      CASE WHEN count(num_documents) = count(*) THEN sum(num_documents)::BIGINT END AS num_documents,
      map_from_entries(list((corpus, value) ORDER BY corpus)) AS perplexity_by_corpus
    FROM perplexities GROUP BY ALL),
  sparsities AS (
    SELECT r.run_id, v.model, s.variant, s.corpus, avg(s.sparsity ORDER BY s.layer) AS sparsity,
      avg(s.threshold ORDER BY s.layer) AS threshold, any_value(c.share) AS share
    FROM sparsity s JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (s.artifact, s.variant)
    LEFT JOIN corpus_shares c ON (c.artifact, c.corpus) = (s.artifact, s.corpus)
    GROUP BY r.run_id, v.model, s.variant, s.corpus, s.artifact, r.measured_at
    QUALIFY row_number() OVER (
      PARTITION BY r.run_id, v.model, s.variant, s.corpus
      ORDER BY max(s.num_tokens) DESC, r.measured_at DESC, s.artifact) = 1),
  zeros AS (
    SELECT run_id, model, variant, avg(threshold ORDER BY corpus) AS threshold,
      coalesce(any_value(sparsity) FILTER (corpus = 'mixed'), by_share(sparsity, share, corpus)) AS sparsity,
      map_from_entries(list((corpus, sparsity) ORDER BY corpus)) AS sparsity_by_corpus
    FROM sparsities GROUP BY ALL),
  accuracies AS (
    SELECT run_id, model, variant, avg(value ORDER BY benchmark) AS accuracy,
      CASE WHEN count(stderr) = count(*) THEN sqrt(sum(stderr^2 ORDER BY benchmark)) / count(*) END AS accuracy_stderr,
      count(*) AS num_benchmarks, bool_or(partial) AS partial
    FROM benchmarks GROUP BY ALL),
  columns AS (
    SELECT run_id, model, variant,
      max(value) FILTER (suite = 'code') AS code, max(value) FILTER (suite = 'commonsense') AS commonsense,
      max(value) FILTER (suite = 'reading') AS reading, max(value) FILTER (suite = 'gsm8k') AS gsm8k,
      max(value) FILTER (suite = 'mmlu') AS mmlu, max(value) FILTER (suite = 'bbh') AS bbh,
      max(value) FILTER (suite = 'agieval') AS agieval, list_sort(flatten(list(not_measured))) AS incomplete,
      CASE WHEN count(stderr) = 7 THEN sqrt(sum(stderr^2 ORDER BY suite)) / 7 END AS stderr
    FROM suites WHERE suite IN ('code', 'commonsense', 'reading', 'gsm8k', 'mmlu', 'bbh', 'agieval') GROUP BY ALL),
  originals AS (
    FROM variant_differences WHERE base_setting = 'original' AND corpus = 'all' AND metric = 'token_perplexity'
    QUALIFY row_number() OVER (PARTITION BY run_id, model, variant ORDER BY base) = 1),
  absent AS (
    SELECT r.run_id, v.model, e.variant,
      list_sort(list(DISTINCT coalesce(e.task, e.corpus) || ': ' || e.note)) AS not_measured
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.value IS NULL GROUP BY ALL)
  SELECT m.run_id, m.recipe, m.model, m.source_precision, m.setting, m.seed, m.l1, z.sparsity, p.perplexity,
    p.perplexity * p.relative_error AS perplexity_stderr, o.value AS times_original, o.low AS times_original_low,
    o.high AS times_original_high, s.accuracy, s.accuracy_stderr, s.num_benchmarks, s.partial,
    p.weighted_by, p.window_tokens, p.num_documents, z.threshold, z.sparsity_by_corpus, p.perplexity_by_corpus,
    c.code, c.commonsense, c.reading, c.gsm8k, c.mmlu, c.bbh, c.agieval,
    CASE WHEN len(c.incomplete) = 0
         THEN (c.code + c.commonsense + c.reading + c.gsm8k + c.mmlu + c.bbh + c.agieval) / 7 END AS average,
    CASE WHEN average IS NOT NULL THEN c.stderr END AS average_stderr, c.incomplete, a.not_measured, m.tokens_seen,
    m.variant
  FROM measured m
  LEFT JOIN zeros z ON (z.model, z.variant) = (m.model, m.variant) AND z.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN perplexity p ON (p.model, p.variant) = (m.model, m.variant) AND p.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN originals o ON (o.model, o.variant) = (m.model, m.variant) AND o.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN accuracies s ON (s.model, s.variant) = (m.model, m.variant) AND s.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN columns c ON (c.model, c.variant) = (m.model, m.variant) AND c.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN absent a ON (a.model, a.variant) = (m.model, m.variant) AND a.run_id IS NOT DISTINCT FROM m.run_id;
COMMENT ON VIEW leaderboard IS
  'The paper''s columns from our own rows: one line per run and variant. Where something was measured twice in a run, '
  'the complete and then the newest measurement counts.';

CREATE MACRO paper_model(model) AS
  CASE WHEN regexp_matches(lower(model), 'llama-?2.*13b') THEN 'llama2-13b'
       WHEN regexp_matches(lower(model), 'llama-?2.*7b') THEN 'llama2-7b'
       WHEN regexp_matches(lower(model), 'minicpm.*1b') THEN 'minicpm-1b' END;
COMMENT ON MACRO paper_model IS 'The name a model has in published, or NULL when the paper does not treat it.';

CREATE MACRO paper_baseline(metric) AS CASE WHEN metric LIKE 'decode%' THEN 'llama_cpp' ELSE 'torch' END;
COMMENT ON MACRO paper_baseline IS
  'What the paper''s speedups are over: dense torch on its A100 for S2 and S3, for decoding (by PowerInfer) dense '
  'llama.cpp, bound by the host''s CPU.';

CREATE VIEW recipe_tokens AS
  SELECT run_id, try_cast(regexp_extract(recipe_yaml, 'tokens_per_step: (\d+)', 1) AS BIGINT)
    * list_max([try_cast(step AS BIGINT) FOR step IN regexp_extract_all(recipe_yaml, 'until_step: (\d+)', 1)])
    AS recipe_tokens
  FROM run_starts;
COMMENT ON VIEW recipe_tokens IS
  'How many tokens the recipe of a run trains on in all: its last step, times the tokens of a step. NULL without stages.';

CREATE VIEW paper_gap AS
  WITH long AS (
    SELECT run_id, recipe, model, setting, variant, m.metric, 100 * m.value AS value, 100 * m.stderr AS stderr,
      m.partial
    FROM leaderboard,
      unnest([{metric: 'sparsity_pct', value: sparsity, stderr: NULL::DOUBLE, partial: NULL::BOOLEAN},
              {metric: 'average_pct', value: average, stderr: average_stderr, partial: partial}]) u(m)
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, suite || '_pct' AS metric, 100 * value AS value,
      100 * stderr AS stderr, partial, not_measured
    FROM suites
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, 'sparsity_pct/' || e.key AS metric, 100 * e.value AS value
    FROM leaderboard, unnest(map_entries(sparsity_by_corpus)) u(e) WHERE e.key <> 'mixed'
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, benchmark || '_pct' AS metric, 100 * value AS value,
      100 * stderr AS stderr, partial, not_measured
    FROM benchmarks WHERE benchmark <> suite
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, name || '_pct' AS metric, 100 * value AS value
    FROM results
    WHERE kind = 'predictor' AND name IN ('recall', 'predicted_sparsity') AND (conditions->>'cutoff')::DOUBLE = 0.5
      AND coalesce(conditions->>'label_rule', '') NOT LIKE '%, against %'
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, kernel || '_speedup' AS metric,
      sum(baseline_us) / sum(p50_us) AS value, baseline, device -- layers timed one by one count together
    FROM speedup
    WHERE is_best AND kernel IN ('s2', 's3', 'decode') AND variant IS NOT NULL AND cutoff IS NULL
      AND (mask_source IS NULL OR mask_source NOT IN ('random', 'raised')) AND coalesce(num_tokens, 1) = 1
      AND provider NOT LIKE '%certified' -- S2 and S3 of the paper skip what the exact gate leaves
    GROUP BY run_id, recipe, model, setting, variant, kernel, baseline, device, provider, dtype, threads, timer,
      prompt_tokens, artifact
    QUALIFY row_number() OVER ( -- the one that the closing line of a run shows
      PARTITION BY run_id, model, variant, metric
      ORDER BY dtype IN ('float32', 'fp32') DESC, prompt_tokens NULLS FIRST, provider, dtype, threads, artifact) = 1),
  ours AS (
    SELECT o.*, b.seed, b.l1, b.source_precision, b.tokens_seen, t.recipe_tokens
    FROM long o LEFT JOIN leaderboard b
      ON (b.model, b.variant) = (o.model, o.variant) AND b.run_id IS NOT DISTINCT FROM o.run_id
    LEFT JOIN recipe_tokens t ON t.run_id = o.run_id
    WHERE o.value IS NOT NULL AND o.setting IS NOT NULL),
  paper AS (
    FROM published
    QUALIFY row_number() OVER (PARTITION BY model, setting, metric, condition ORDER BY source) = 1)
  SELECT o.run_id, o.recipe, o.model, o.setting, o.seed, o.l1, o.metric, o.value AS ours, o.stderr, o.baseline,
    o.device, coalesce(o.partial, FALSE) AS partial, coalesce(o.not_measured, []) AS not_measured, p.value AS paper,
    nullif(array_to_string(list_filter([
      CASE WHEN p.value IS NULL THEN 'the paper prints no such number' END,
      CASE WHEN p.value IS NOT NULL AND paper_model(o.model) IS NULL
           THEN 'the paper does not treat ' || concat_ws(', ', o.model, o.source_precision) || ': ' || p.model
             || ' stands beside it' END,
      CASE WHEN len(coalesce(o.not_measured, [])) > 0
           THEN 'ours is without ' || array_to_string(o.not_measured, ', ') END,
      CASE WHEN p.value IS NOT NULL AND o.baseline IS NOT NULL
             AND (o.baseline <> paper_baseline(o.metric) OR coalesce(o.device, '') NOT LIKE '%A100%')
           THEN 'ours is on ' || coalesce(o.device, 'an unknown device') || ' over ' || o.baseline
             || ', the paper''s on an A100 over ' || paper_baseline(o.metric) END,
      CASE WHEN p.value IS NOT NULL AND o.tokens_seen BETWEEN 1 AND o.recipe_tokens - 1
           THEN printf('ours saw %.0f %% of the recipe''s training tokens, the paper''s all of them',
                       100 * o.tokens_seen / o.recipe_tokens) END],
      lambda part: part IS NOT NULL), '; '), '') AS reason,
    CASE WHEN reason IS NULL THEN o.value - p.value END AS gap,
    p.model AS paper_model, p.source, p.condition, o.variant
  FROM ours o
  LEFT JOIN paper p ON p.model = coalesce(paper_model(o.model), 'llama2-7b')
    AND p.setting = o.setting AND lower(p.metric) = lower(o.metric) AND p.condition = ''
  UNION ALL BY NAME
  SELECT p.model, p.setting, p.metric, p.value AS paper, p.model AS paper_model, p.source, p.condition,
    'not measured here' AS reason
  FROM paper p
  WHERE p.condition <> '' OR NOT EXISTS (
    FROM ours o
    WHERE paper_model(o.model) = p.model AND o.setting = p.setting AND lower(o.metric) = lower(p.metric));
COMMENT ON VIEW paper_gap IS
  'Our numbers beside the published ones, both in per cent (speedups as ratios, over the best dense kernel of the same '
  'session). There is a gap only where both measured the same: the model, all benchmarks of a mean, all tokens of the '
  'recipe, and for speedups the device and the baseline; else reason says why not. A published number nobody measured '
  'here, or one under a condition of its own (more tokens, another threshold), has ours NULL.';
