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

CREATE VIEW leaderboard AS
  WITH measured AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, v.variant, any_value(v.tokens_seen) AS tokens_seen,
      any_value(v.seed) AS seed, any_value(v.l1) AS l1, any_value(v.source_precision) AS source_precision
    FROM run_artifacts r JOIN variant_facts v USING (artifact) GROUP BY ALL),
  perplexities AS (
    SELECT r.run_id, v.model, e.variant, e.corpus, e.value, e.stderr, e.n
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
           WHEN count(n) = count(*) THEN exp(sum(n * ln(value) ORDER BY corpus) / sum(n))
           ELSE exp(avg(ln(value) ORDER BY corpus)) END AS perplexity,
      -- Delta method: a relative error of perplexity is an absolute one of its logarithm, which is what is averaged.
      CASE WHEN bool_or(corpus = 'mixed') THEN any_value(stderr / value) FILTER (corpus = 'mixed')
           WHEN count(stderr) < count(*) THEN NULL
           WHEN count(n) = count(*) THEN sqrt(sum((n * stderr / value)^2 ORDER BY corpus)) / sum(n)
           ELSE sqrt(sum((stderr / value)^2 ORDER BY corpus)) / count(*) END AS relative_error,
      map_from_entries(list((corpus, value) ORDER BY corpus)) AS perplexity_by_corpus
    FROM perplexities GROUP BY ALL),
  sparsities AS (
    SELECT r.run_id, v.model, s.variant, s.corpus, avg(s.sparsity ORDER BY s.layer) AS sparsity,
      avg(s.threshold ORDER BY s.layer) AS threshold
    FROM sparsity s JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (s.artifact, s.variant)
    GROUP BY r.run_id, v.model, s.variant, s.corpus, s.artifact, r.measured_at
    QUALIFY row_number() OVER (
      PARTITION BY r.run_id, v.model, s.variant, s.corpus
      ORDER BY max(s.num_tokens) DESC, r.measured_at DESC, s.artifact) = 1),
  zeros AS (
    SELECT run_id, model, variant, avg(threshold ORDER BY corpus) AS threshold,
      coalesce(any_value(sparsity) FILTER (corpus = 'mixed'), avg(sparsity ORDER BY corpus)) AS sparsity,
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
  absent AS (
    SELECT r.run_id, v.model, e.variant,
      list_sort(list(DISTINCT coalesce(e.task, e.corpus) || ': ' || e.note)) AS not_measured
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.value IS NULL GROUP BY ALL)
  SELECT m.run_id, m.recipe, m.model, m.source_precision, m.setting, m.seed, m.l1, z.sparsity, p.perplexity,
    p.perplexity * p.relative_error AS perplexity_stderr, s.accuracy, s.accuracy_stderr, s.num_benchmarks, s.partial,
    z.threshold, z.sparsity_by_corpus, p.perplexity_by_corpus,
    c.code, c.commonsense, c.reading, c.gsm8k, c.mmlu, c.bbh, c.agieval,
    CASE WHEN len(c.incomplete) = 0
         THEN (c.code + c.commonsense + c.reading + c.gsm8k + c.mmlu + c.bbh + c.agieval) / 7 END AS average,
    CASE WHEN average IS NOT NULL THEN c.stderr END AS average_stderr, c.incomplete, a.not_measured, m.tokens_seen,
    m.variant
  FROM measured m
  LEFT JOIN zeros z ON (z.model, z.variant) = (m.model, m.variant) AND z.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN perplexity p ON (p.model, p.variant) = (m.model, m.variant) AND p.run_id IS NOT DISTINCT FROM m.run_id
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
    SELECT run_id, recipe, model, setting, variant, kernel || '_speedup' AS metric, max(speedup) AS value
    FROM (SELECT run_id, recipe, model, setting, variant, kernel, provider, baseline, dtype, threads, timer, device,
            median(speedup) AS speedup -- over layers
          FROM speedup
          WHERE kernel IN ('s2', 's3', 'decode') AND variant IS NOT NULL AND cutoff IS NULL
            AND (mask_source IS NULL OR mask_source NOT IN ('random', 'raised'))
            AND baseline NOT IN ('dense', 'native_dense') AND coalesce(num_tokens, 1) = 1
          GROUP BY ALL)
    GROUP BY ALL),
  ours AS (
    SELECT o.*, b.seed, b.l1
    FROM long o LEFT JOIN leaderboard b
      ON (b.model, b.variant) = (o.model, o.variant) AND b.run_id IS NOT DISTINCT FROM o.run_id
    WHERE o.value IS NOT NULL AND o.setting IS NOT NULL),
  paper AS (
    FROM published
    QUALIFY row_number() OVER (PARTITION BY model, setting, metric, condition ORDER BY source) = 1)
  SELECT o.run_id, o.recipe, o.model, o.setting, o.seed, o.l1, o.metric, o.value AS ours, o.stderr,
    coalesce(o.partial, FALSE) AS partial, coalesce(o.not_measured, []) AS not_measured, p.value AS paper,
    CASE WHEN paper_model(o.model) IS NOT NULL AND len(coalesce(o.not_measured, [])) = 0
         THEN o.value - p.value END AS gap,
    p.model AS paper_model, p.source, p.condition, o.variant
  FROM ours o
  LEFT JOIN paper p ON p.model = coalesce(paper_model(o.model), 'llama2-7b')
    AND p.setting = o.setting AND lower(p.metric) = lower(o.metric) AND p.condition = ''
  UNION ALL BY NAME
  SELECT p.model, p.setting, p.metric, p.value AS paper, p.model AS paper_model, p.source, p.condition
  FROM paper p
  WHERE p.condition <> '' OR NOT EXISTS (
    FROM ours o
    WHERE paper_model(o.model) = p.model AND o.setting = p.setting AND lower(o.metric) = lower(p.metric));
COMMENT ON VIEW paper_gap IS
  'Our numbers beside the published ones, both in per cent (speedups as ratios). A model the paper does not treat '
  'stands beside LLaMA2-7B, without a gap, as does a mean that lacks a benchmark (not_measured); a published number nobody measured here, or one under '
  'a condition of its own (more tokens, another threshold), has ours NULL.';
