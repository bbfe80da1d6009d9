-- The paper's tables from our own rows, and beside the published ones.

CREATE VIEW benchmarks AS
  WITH scores AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, e.variant, e.task, e.metric AS exact_metric,
      split_part(e.metric, ',', 1) AS metric, e.value, e.stderr, e.n, e."limit" IS NOT NULL AS partial, r.measured_at,
      coalesce(e.headline, FALSE) AS headline,
      CASE WHEN e.task = 'mmlu' OR (e.task LIKE 'mmlu\_%' ESCAPE '\' AND e.task NOT LIKE 'mmlu\_pro%' ESCAPE '\')
             THEN 'mmlu'
           WHEN e.task = 'bbh' OR e.task LIKE 'bbh\_%' ESCAPE '\' THEN 'bbh'
           WHEN e.task = 'agieval' OR e.task LIKE 'agieval\_%' ESCAPE '\' THEN 'agieval'
           WHEN e.task LIKE 'tydiqa%' THEN 'tydiqa'
           WHEN e.task LIKE 'lambada%' THEN 'lambada'
           WHEN e.task = 'social_iqa' THEN 'siqa'
           ELSE e.task END AS benchmark,
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
        list_position(['acc', 'exact_match', 'pass@1', 'pass_at_1', 'acc_norm', 'f1'], metric), exact_metric DESC) = 1)
  SELECT run_id, recipe, model, setting, variant,
    CASE WHEN benchmark IN ('humaneval', 'mbpp') THEN 'code'
         WHEN benchmark IN ('piqa', 'siqa', 'hellaswag', 'winogrande', 'copa') THEN 'commonsense'
         WHEN benchmark IN ('boolq', 'lambada', 'tydiqa') THEN 'reading'
         ELSE benchmark END AS suite,
    benchmark, string_agg(DISTINCT exact_metric, ' ') AS metric,
    coalesce(avg(value ORDER BY task) FILTER (is_group), avg(value ORDER BY task)) AS value,
    CASE WHEN bool_or(is_group)
         THEN CASE WHEN count(stderr) FILTER (is_group) = count(*) FILTER (is_group)
                   THEN sqrt(sum(stderr^2 ORDER BY task) FILTER (is_group)) / count(*) FILTER (is_group) END
         WHEN count(stderr) = count(*) THEN sqrt(sum(stderr^2 ORDER BY task)) / count(*) END AS stderr,
    coalesce(sum(n) FILTER (is_group), sum(n)) AS n,
    bool_or(partial) AS partial, max(measured_at) AS measured_at
  FROM chosen GROUP BY ALL;
COMMENT ON VIEW benchmarks IS
  'One score per run, variant and benchmark: the metric marked headline, else acc, exact_match, pass@1, acc_norm, f1 '
  'in this order; sub-tasks are averaged where no group score exists. Suites are the columns of the paper''s Table 1.';

CREATE VIEW leaderboard AS
  WITH measured AS (
    SELECT r.run_id, r.recipe, v.model, v.setting, v.variant, any_value(v.tokens_seen) AS tokens_seen,
      any_value(v.seed) AS seed, any_value(v.l1) AS l1
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
  suites AS (
    SELECT run_id, model, variant, suite, avg(value ORDER BY benchmark) AS value, count(*) AS num_benchmarks,
      sum(value ORDER BY benchmark) AS total, count(stderr) AS num_stderr, sum(stderr^2 ORDER BY benchmark) AS variance,
      bool_or(partial) AS partial
    FROM benchmarks GROUP BY ALL),
  scores AS (
    SELECT run_id, model, variant, sum(total ORDER BY suite) / sum(num_benchmarks) AS accuracy,
      CASE WHEN sum(num_stderr) = sum(num_benchmarks)
           THEN sqrt(sum(variance ORDER BY suite)) / sum(num_benchmarks) END AS accuracy_stderr,
      sum(num_benchmarks)::BIGINT AS num_benchmarks, bool_or(partial) AS partial,
      max(value) FILTER (suite = 'code') AS code, max(value) FILTER (suite = 'commonsense') AS commonsense,
      max(value) FILTER (suite = 'reading') AS reading, max(value) FILTER (suite = 'gsm8k') AS gsm8k,
      max(value) FILTER (suite = 'mmlu') AS mmlu, max(value) FILTER (suite = 'bbh') AS bbh,
      max(value) FILTER (suite = 'agieval') AS agieval
    FROM suites GROUP BY ALL),
  absent AS (
    SELECT r.run_id, v.model, e.variant,
      list_sort(list(DISTINCT coalesce(e.task, e.corpus) || ': ' || e.note)) AS not_measured
    FROM evaluations e JOIN run_artifacts r USING (artifact)
    JOIN variant_facts v ON (v.artifact, v.variant) = (e.artifact, e.variant)
    WHERE e.value IS NULL GROUP BY ALL)
  SELECT m.run_id, m.recipe, m.model, m.setting, m.seed, m.l1, z.sparsity, p.perplexity,
    p.perplexity * p.relative_error AS perplexity_stderr, s.accuracy, s.accuracy_stderr, s.num_benchmarks, s.partial,
    z.threshold, z.sparsity_by_corpus, p.perplexity_by_corpus,
    s.code, s.commonsense, s.reading, s.gsm8k, s.mmlu, s.bbh, s.agieval,
    (s.code + s.commonsense + s.reading + s.gsm8k + s.mmlu + s.bbh + s.agieval) / 7 AS average,
    a.not_measured, m.tokens_seen, m.variant
  FROM measured m
  LEFT JOIN zeros z ON (z.model, z.variant) = (m.model, m.variant) AND z.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN perplexity p ON (p.model, p.variant) = (m.model, m.variant) AND p.run_id IS NOT DISTINCT FROM m.run_id
  LEFT JOIN scores s ON (s.model, s.variant) = (m.model, m.variant) AND s.run_id IS NOT DISTINCT FROM m.run_id
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
    SELECT run_id, recipe, model, setting, variant, m.metric, 100 * m.value AS value
    FROM leaderboard,
      unnest([{metric: 'sparsity_pct', value: sparsity}, {metric: 'code_pct', value: code},
              {metric: 'commonsense_pct', value: commonsense}, {metric: 'reading_pct', value: reading},
              {metric: 'gsm8k_pct', value: gsm8k}, {metric: 'mmlu_pct', value: mmlu}, {metric: 'bbh_pct', value: bbh},
              {metric: 'agieval_pct', value: agieval}, {metric: 'average_pct', value: average}]) u(m)
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, 'sparsity_pct/' || e.key AS metric, 100 * e.value AS value
    FROM leaderboard, unnest(map_entries(sparsity_by_corpus)) u(e) WHERE e.key <> 'mixed'
    UNION ALL BY NAME
    SELECT run_id, recipe, model, setting, variant, benchmark || '_pct' AS metric, 100 * value AS value
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
  SELECT o.run_id, o.recipe, o.model, o.setting, o.seed, o.l1, o.metric, o.value AS ours, p.value AS paper,
    CASE WHEN paper_model(o.model) IS NOT NULL THEN o.value - p.value END AS gap,
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
  'stands beside LLaMA2-7B, without a gap; a published number nobody measured here, or one under '
  'a condition of its own (more tokens, another threshold), has ours NULL.';
