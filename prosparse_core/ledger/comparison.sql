-- What a comparison of settings came to: every setting with its spread over seeds, and progressive regularization
-- beside a fixed factor at the same sparsity, seed by seed.

CREATE MACRO before_thresholds(setting) AS
  CASE WHEN setting = 'prosparse' THEN 'prosparse_star' ELSE regexp_replace(setting, '_fatrelu$', '') END;
COMMENT ON MACRO before_thresholds IS 'The setting that thresholds were calibrated for; any other setting is its own.';

CREATE MACRO t_quantile(freedom) AS
  CASE WHEN freedom <= 30 THEN
    [12.70620474, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425, 2.30600414, 2.26215716,
     2.22813885, 2.20098516, 2.17881283, 2.16036866, 2.14478669, 2.13144955, 2.11990530, 2.10981558, 2.10092204,
     2.09302405, 2.08596345, 2.07961384, 2.07387307, 2.06865761, 2.06389856, 2.05953855, 2.05552944, 2.05183052,
     2.04840714, 2.04522964, 2.04227246][freedom]
  ELSE 1.95996398 + 2.37227123 / freedom + 2.82249973 / freedom^2 + 2.55585000 / freedom^3 END; -- Cornish and Fisher
COMMENT ON MACRO t_quantile IS 'How many standard errors a 95 % interval reaches, by Student''s t.';

CREATE VIEW lambda_courses AS
  WITH RECURSIVE chain AS (
    SELECT DISTINCT checkpoint, checkpoint AS artifact FROM variant_facts WHERE checkpoint IS NOT NULL
    UNION
    SELECT c.checkpoint, l.input FROM chain c JOIN lineage l USING (artifact)
    WHERE l.role = 'before' AND l.step = 'stage'),
  steps_of AS (
    SELECT c.checkpoint, t.step, t.l1_lambda, t.lr, last_value(t.l1_lambda) OVER course AS last_l1
    FROM chain c JOIN train_metrics t USING (artifact)
    WINDOW course AS (PARTITION BY c.checkpoint ORDER BY t.step ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)),
  settled AS (
    SELECT *, coalesce(max(step) FILTER (l1_lambda <> last_l1) OVER (PARTITION BY checkpoint), 0) AS last_other
    FROM steps_of)
  SELECT checkpoint, max(step) AS num_steps, count(*) FILTER (l1_lambda > 0) AS regularized_steps,
    sum(l1_lambda ORDER BY step) AS l1_sum, max(step) - any_value(last_other) AS steps_at_last_l1,
    any_value(lr) FILTER (step = last_other + 1) / max(lr) AS lr_at_last_l1,
    sum(lr ORDER BY step) FILTER (step > last_other) / sum(lr ORDER BY step) FILTER (l1_lambda > 0) AS lr_left
  FROM settled GROUP BY checkpoint
  HAVING any_value(last_l1) > 0 AND count(*) = max(step) AND count(DISTINCT step) = max(step);
COMMENT ON VIEW lambda_courses IS
  'How lambda went in the training behind a checkpoint, from the log of every step: how much of it in all, for how long '
  'at its last value, and how much learning rate was left by then. Only where lambda is above 0 in the end.';

CREATE VIEW comparison AS
  WITH rivals AS (
    SELECT b.*, min(b.l1) OVER w < max(b.l1) OVER w AS is_varied, -- one seed, several factors
      c.regularized_steps, c.num_steps, c.l1_sum, c.steps_at_last_l1, c.lr_at_last_l1, c.lr_left
    FROM leaderboard b
    LEFT JOIN (SELECT DISTINCT model, variant, checkpoint FROM variants) v USING (model, variant)
    LEFT JOIN lambda_courses c USING (checkpoint)
    WHERE perplexity IS NOT NULL OR sparsity IS NOT NULL OR accuracy IS NOT NULL -- what was only calibrated has no line
    WINDOW w AS (PARTITION BY b.run_id, b.model, b.setting, b.seed)),
  factored AS (
    SELECT *, CASE WHEN setting = 'fixed_l1' OR bool_or(is_varied) OVER (PARTITION BY run_id, model, setting)
                   THEN l1 END AS factor
    FROM rivals),
  numbered AS ( -- two variants of one seed and factor are no spread over seeds: each has a line of its own
    SELECT *, row_number() OVER (PARTITION BY run_id, model, setting, factor, seed ORDER BY variant) AS twin
    FROM factored)
  SELECT run_id, recipe, model, any_value(source_precision) AS source_precision, setting,
    CASE WHEN min(l1) = max(l1) THEN min(l1) END AS l1, count(*) AS num_seeds, list(seed ORDER BY seed, variant) AS seeds,
    avg(perplexity ORDER BY seed, variant) AS perplexity, stddev_samp(perplexity ORDER BY seed, variant) AS perplexity_sd,
    avg(perplexity_stderr ORDER BY seed, variant) AS perplexity_stderr,
    avg(sparsity ORDER BY seed, variant) AS sparsity, stddev_samp(sparsity ORDER BY seed, variant) AS sparsity_sd,
    avg(accuracy ORDER BY seed, variant) AS accuracy, stddev_samp(accuracy ORDER BY seed, variant) AS accuracy_sd,
    avg(accuracy_stderr ORDER BY seed, variant) AS accuracy_stderr, max(num_benchmarks) AS num_benchmarks,
    bool_or(partial) AS partial, avg(threshold ORDER BY seed, variant) AS threshold,
    CASE WHEN min(tokens_seen) = max(tokens_seen) THEN min(tokens_seen) END AS tokens_seen,
    max(num_steps) AS num_steps, avg(regularized_steps) AS regularized_steps,
    avg(l1_sum ORDER BY seed, variant) AS l1_sum, avg(steps_at_last_l1) AS steps_at_last_l1,
    avg(lr_at_last_l1 ORDER BY seed, variant) AS lr_at_last_l1, avg(lr_left ORDER BY seed, variant) AS lr_left,
    list(perplexity ORDER BY seed, variant) AS perplexities, list(sparsity ORDER BY seed, variant) AS sparsities,
    list(variant ORDER BY seed, variant) AS variants
  FROM numbered GROUP BY run_id, recipe, model, setting, factor, twin;
COMMENT ON VIEW comparison IS
  'One line per run and setting, for several factors one each: means over seeds with their standard deviation (NULL for '
  'one seed), the standard error of the evaluation itself, and how lambda went. Order by sparsity to read it as a curve.';

CREATE VIEW matched_sparsity AS
  WITH points AS (
    SELECT run_id, recipe, model, setting, before_thresholds(setting) AS base, setting <> base AS with_thresholds, seed,
      l1, tokens_seen, sparsity, ln(perplexity) AS nats, variant,
      base IN ('prosparse_star', 'linear_ramp', 'exponential_ramp', 'closed_loop', 'drelu', 'distilled',
               'distilled_equal_time') AS is_progressive,
      coalesce(bool_or(is_varied) OVER (PARTITION BY run_id, model, setting), FALSE) AS has_factors
    FROM (SELECT *, min(l1) OVER w < max(l1) OVER w AS is_varied FROM leaderboard
          WHERE setting IS NOT NULL AND (perplexity IS NOT NULL OR sparsity IS NOT NULL)
          WINDOW w AS (PARTITION BY run_id, model, setting, seed))),
  asked AS ( -- every point of a progressive setting, and every fixed factor where the setting is a curve itself
    SELECT run_id, recipe, model, setting, base, with_thresholds, 'progressive' AS measured, seed, l1, tokens_seen,
      sparsity, nats, variant, CASE WHEN has_factors THEN l1 END AS factor
    FROM points WHERE is_progressive
    UNION ALL BY NAME
    SELECT f.run_id, f.recipe, f.model, s.setting, s.base, f.with_thresholds, 'fixed' AS measured, f.seed, f.l1,
      f.tokens_seen, f.sparsity, f.nats, f.variant, f.l1 AS factor
    FROM points f
    JOIN (SELECT DISTINCT run_id, model, setting, base, with_thresholds, tokens_seen FROM points
          WHERE is_progressive AND has_factors) s
      ON (s.model, s.with_thresholds, s.tokens_seen) = (f.model, f.with_thresholds, f.tokens_seen)
      AND s.run_id IS NOT DISTINCT FROM f.run_id
    WHERE f.base = 'fixed_l1'),
  bracketed AS (
    SELECT a.run_id, a.model, a.setting, a.measured, a.variant, count(o.variant) FILTER (o.l1 > 0) AS num_factors,
      min(o.sparsity) AS least, max(o.sparsity) AS most,
      first(o ORDER BY o.sparsity DESC, o.variant) FILTER (o.sparsity <= a.sparsity) AS below,
      first(o ORDER BY o.sparsity, o.variant) FILTER (o.sparsity >= a.sparsity) AS above
    FROM asked a LEFT JOIN points o
      ON (o.model, o.with_thresholds) = (a.model, a.with_thresholds) AND o.run_id IS NOT DISTINCT FROM a.run_id
      AND o.seed IS NOT DISTINCT FROM a.seed AND o.nats IS NOT NULL AND o.sparsity IS NOT NULL
      AND (o.tokens_seen = a.tokens_seen OR a.base = 'distilled_equal_time') -- which pays its time in tokens
      AND CASE WHEN o.base = 'vanilla_relu' THEN a.measured = 'progressive' OR a.base = 'prosparse_star' -- factor 0
               WHEN a.measured = 'progressive' THEN o.base = 'fixed_l1'
               ELSE o.setting = a.setting END
    GROUP BY ALL),
  placed AS (
    SELECT a.*, b.below, b.above, b.least, b.most, b.num_factors,
      CASE WHEN b.above.sparsity > b.below.sparsity
           THEN (a.sparsity - b.below.sparsity) / (b.above.sparsity - b.below.sparsity)
           WHEN b.above.sparsity = b.below.sparsity THEN 0 END AS share,
      CASE WHEN b.num_factors > 0 THEN (1 - share) * b.below.nats + share * b.above.nats END AS other_nats
    FROM asked a JOIN bracketed b
      ON (b.model, b.setting, b.measured, b.variant) = (a.model, a.setting, a.measured, a.variant)
      AND b.run_id IS NOT DISTINCT FROM a.run_id),
  paired AS (
    SELECT *, nats IS NOT NULL AND other_nats IS NOT NULL AS is_pair,
      CASE measured WHEN 'fixed' THEN other_nats ELSE nats END AS progressive_nats,
      CASE measured WHEN 'fixed' THEN nats ELSE other_nats END AS fixed_nats,
      CASE WHEN is_pair THEN progressive_nats - fixed_nats END AS difference,
      CASE measured WHEN 'fixed' THEN 'progressive factors' ELSE 'fixed factors' END AS others,
      CASE WHEN is_pair THEN NULL
           WHEN nats IS NULL OR sparsity IS NULL THEN 'its perplexity or its sparsity was not measured'
           WHEN num_factors = 0 AND measured = 'fixed' THEN 'no progressive setting of this seed saw as many tokens'
           WHEN num_factors = 0 THEN 'the run measured no fixed_l1 of this seed that saw as many tokens'
           WHEN below IS NULL
             THEN printf('its sparsity of %.2f %% is below the least of the %s, %.2f %%: that would be extrapolation',
                         100 * sparsity, others, 100 * least)
           ELSE printf('its sparsity of %.2f %% is above the most of the %s, %.2f %%: that would be extrapolation',
                       100 * sparsity, others, 100 * most) END AS why_not,
      -- two variants of one seed and factor are no pairs of two seeds
      row_number() OVER (PARTITION BY run_id, model, setting, measured, factor, seed ORDER BY variant) AS twin
    FROM placed),
  counted AS (
    SELECT *, count(*) FILTER (is_pair) OVER (
      PARTITION BY run_id, model, setting, measured, factor, twin) AS num_pairs
    FROM paired),
  told AS (
    SELECT run_id, recipe, model, setting, with_thresholds, measured, num_pairs,
      CASE WHEN min(l1) = max(l1) THEN min(l1) END AS l1, count(*) AS num_seeds,
      list(seed ORDER BY seed) FILTER (is_pair) AS seeds,
      CASE WHEN min(tokens_seen) = max(tokens_seen) THEN min(tokens_seen) END AS tokens_seen,
      avg(sparsity ORDER BY seed) FILTER (is_pair OR num_pairs = 0) AS sparsity,
      exp(avg(progressive_nats ORDER BY seed) FILTER (is_pair OR num_pairs = 0)) AS perplexity,
      exp(avg(fixed_nats ORDER BY seed) FILTER (is_pair OR num_pairs = 0)) AS fixed_perplexity,
      avg(difference ORDER BY seed) AS mean, stddev_samp(difference ORDER BY seed) / sqrt(num_pairs) AS error,
      list(100 * (exp(difference) - 1) ORDER BY seed) FILTER (is_pair) AS differences_pct,
      min(below.l1) FILTER (is_pair) AS l1_below, max(above.l1) FILTER (is_pair) AS l1_above,
      CASE WHEN count(*) = 1 THEN any_value(why_not)
           ELSE string_agg(concat('seed ', seed, ': ', why_not), '; ' ORDER BY seed) FILTER (why_not IS NOT NULL) END
        AS left_out,
      first(variant ORDER BY seed) AS variant
    FROM counted GROUP BY run_id, recipe, model, setting, with_thresholds, measured, factor, twin, num_pairs)
  SELECT * EXCLUDE (mean, error, left_out, variant), 100 * (exp(mean) - 1) AS difference_pct,
    100 * (exp(mean - t_quantile(num_pairs - 1) * error) - 1) AS difference_low_pct,
    100 * (exp(mean + t_quantile(num_pairs - 1) * error) - 1) AS difference_high_pct,
    CASE WHEN num_pairs = 0 THEN left_out END AS reason,
    CASE WHEN num_pairs = 0 THEN left_out
         WHEN num_pairs = 1
           THEN concat_ws('; ', 'one pair of seeds has no spread: an interval needs two', left_out) END
      AS no_interval,
    variant
  FROM told;
COMMENT ON VIEW matched_sparsity IS
  'Does progressive regularization cost less than a fixed factor? Both arms at the same sparsity, tokens and seed '
  '(distilled_equal_time: at the same time), before thresholds and with them: where one arm was measured, the other''s '
  'ln(perplexity) is taken as linear in sparsity between its two nearest points (plain ReLU is the factor 0 of both '
  'arms). The interval is Student''s t over the differences of the seeds. Never extrapolated: then the numbers are NULL '
  'and reason says why; with fewer than two pairs there is no interval.';
