-- What a comparison of settings came to: every setting with its spread over seeds, and progressive regularization
-- beside a fixed factor at the same sparsity.

CREATE MACRO squared_error(n, read_error, var_log, var_zeros, covariance, slope) AS
  CASE WHEN n > 1 THEN greatest(0, var_log + slope^2 * var_zeros - 2 * slope * covariance) / n ELSE read_error^2 END;
COMMENT ON MACRO squared_error IS
  'Squared standard error of ln(perplexity) off a line of that slope in sparsity: from the spread over n seeds, or for '
  'one seed from the evaluation.';

CREATE VIEW comparison AS
  WITH rivals AS (
    SELECT *, min(l1) OVER w < max(l1) OVER w AS is_varied -- one seed, several factors
    FROM leaderboard
    WHERE perplexity IS NOT NULL OR sparsity IS NOT NULL OR accuracy IS NOT NULL -- what was only calibrated has no line
    WINDOW w AS (PARTITION BY run_id, model, setting, seed)),
  factored AS (
    SELECT *, CASE WHEN setting = 'fixed_l1' OR bool_or(is_varied) OVER (PARTITION BY run_id, model, setting)
                   THEN l1 END AS factor
    FROM rivals),
  numbered AS ( -- two variants of one seed and factor are no spread over seeds: each has a line of its own
    SELECT *, row_number() OVER (PARTITION BY run_id, model, setting, factor, seed ORDER BY variant) AS twin
    FROM factored)
  SELECT run_id, recipe, model, setting, CASE WHEN min(l1) = max(l1) THEN min(l1) END AS l1,
    count(*) AS num_seeds, list(seed ORDER BY seed, variant) AS seeds,
    avg(perplexity ORDER BY seed, variant) AS perplexity, stddev_samp(perplexity ORDER BY seed, variant) AS perplexity_sd,
    avg(perplexity_stderr ORDER BY seed, variant) AS perplexity_stderr,
    avg(sparsity ORDER BY seed, variant) AS sparsity, stddev_samp(sparsity ORDER BY seed, variant) AS sparsity_sd,
    avg(accuracy ORDER BY seed, variant) AS accuracy, stddev_samp(accuracy ORDER BY seed, variant) AS accuracy_sd,
    avg(accuracy_stderr ORDER BY seed, variant) AS accuracy_stderr, max(num_benchmarks) AS num_benchmarks,
    bool_or(partial) AS partial, avg(threshold ORDER BY seed, variant) AS threshold,
    CASE WHEN min(tokens_seen) = max(tokens_seen) THEN min(tokens_seen) END AS tokens_seen,
    list(perplexity ORDER BY seed, variant) AS perplexities, list(sparsity ORDER BY seed, variant) AS sparsities,
    list(variant ORDER BY seed, variant) AS variants
  FROM numbered GROUP BY run_id, recipe, model, setting, factor, twin;
COMMENT ON VIEW comparison IS
  'One line per run and setting, for fixed_l1 one per factor: means over seeds with their standard deviation (NULL for '
  'one seed), beside the standard error of the evaluation itself. Order by sparsity to read it as a curve.';

CREATE VIEW matched_sparsity AS
  WITH points AS (
    SELECT run_id, recipe, model, setting, l1, tokens_seen, num_seeds, perplexity, sparsity, variants[1] AS variant,
      perplexity_stderr / perplexity AS read_error, perplexities, sparsities
    FROM comparison),
  spreads AS (
    SELECT run_id, model, variant, count(*) AS n, var_samp(log_perplexity) AS var_log, var_samp(zeros) AS var_zeros,
      covar_samp(log_perplexity, zeros) AS covariance
    FROM (SELECT run_id, model, variant, ln(unnest(perplexities)) AS log_perplexity, unnest(sparsities) AS zeros
          FROM points)
    WHERE log_perplexity IS NOT NULL AND zeros IS NOT NULL GROUP BY ALL),
  spread_points AS (
    SELECT p.*, coalesce(s.n, 0) AS n, s.var_log, s.var_zeros, s.covariance
    FROM points p LEFT JOIN spreads s
      ON (s.model, s.variant) = (p.model, p.variant) AND s.run_id IS NOT DISTINCT FROM p.run_id),
  fixed AS ( -- plain ReLU is the factor 0
    FROM spread_points
    WHERE setting IN ('fixed_l1', 'vanilla_relu') AND perplexity IS NOT NULL AND sparsity IS NOT NULL),
  bracketed AS (
    SELECT p.run_id, p.model, p.variant, count(f.variant) FILTER (f.setting = 'fixed_l1') AS num_factors,
      min(f.sparsity) AS least, max(f.sparsity) AS most,
      first(f ORDER BY f.sparsity DESC, f.variant) FILTER (f.sparsity <= p.sparsity) AS below,
      first(f ORDER BY f.sparsity, f.variant) FILTER (f.sparsity >= p.sparsity) AS above
    FROM spread_points p LEFT JOIN fixed f
      ON f.model = p.model AND f.run_id IS NOT DISTINCT FROM p.run_id
      AND (f.tokens_seen = p.tokens_seen OR p.setting = 'distilled_equal_time') -- which pays its time in tokens
    GROUP BY ALL),
  placed AS (
    SELECT p.*, b.below, b.above, b.least, b.most, b.num_factors,
      CASE WHEN b.above.sparsity > b.below.sparsity
           THEN (p.sparsity - b.below.sparsity) / (b.above.sparsity - b.below.sparsity)
           WHEN b.above.sparsity = b.below.sparsity THEN 0 END AS share,
      CASE WHEN b.above.sparsity > b.below.sparsity
           THEN (ln(b.above.perplexity) - ln(b.below.perplexity)) / (b.above.sparsity - b.below.sparsity)
           ELSE 0 END AS slope
    FROM spread_points p JOIN bracketed b
      ON (b.model, b.variant) = (p.model, p.variant) AND b.run_id IS NOT DISTINCT FROM p.run_id
    WHERE p.setting IN
      ('prosparse_star', 'linear_ramp', 'exponential_ramp', 'closed_loop', 'drelu', 'distilled',
       'distilled_equal_time')),
  compared AS (
    SELECT *, CASE WHEN num_factors > 0
                   THEN exp((1 - share) * ln(below.perplexity) + share * ln(above.perplexity)) END AS fixed_perplexity,
      squared_error(n, read_error, var_log, var_zeros, covariance, slope) AS error_own,
      (1 - share)^2 * squared_error(below.n, below.read_error, below.var_log, below.var_zeros, below.covariance, slope)
        AS error_below,
      share^2 * squared_error(above.n, above.read_error, above.var_log, above.var_zeros, above.covariance, slope)
        AS error_above,
      error_own + error_below + error_above AS error,
      -- Welch-Satterthwaite: the three variances differ; the evaluation's own error counts as known
      coalesce(error_own^2 / nullif(greatest(n - 1, 0), 0), 0)
        + coalesce(error_below^2 / nullif(greatest(below.n - 1, 0), 0), 0)
        + coalesce(error_above^2 / nullif(greatest(above.n - 1, 0), 0), 0) AS error_of_error,
      CASE WHEN share < 1 THEN below.n > 1 ELSE above.n > 1 END AS seeds_on_one_side,
      CASE WHEN share > 0 THEN above.n > 1 ELSE below.n > 1 END AS seeds_on_other_side
    FROM placed)
  SELECT run_id, recipe, model, setting, num_seeds, tokens_seen, sparsity, perplexity, fixed_perplexity,
    100 * (perplexity / fixed_perplexity - 1) AS difference_pct,
    100 * perplexity / fixed_perplexity * sqrt(error) AS difference_stderr_pct,
    CASE WHEN fixed_perplexity IS NULL OR error IS NULL THEN NULL
         WHEN n > 1 AND seeds_on_one_side AND seeds_on_other_side THEN 'seeds'
         WHEN n > 1 OR seeds_on_one_side OR seeds_on_other_side THEN 'seeds and evaluation'
         ELSE 'evaluation' END AS error_source,
    CASE WHEN fixed_perplexity IS NOT NULL AND error_of_error > 0 THEN error^2 / error_of_error END
      AS degrees_of_freedom,
    CASE WHEN num_factors > 0 THEN below.l1 END AS l1_below, CASE WHEN num_factors > 0 THEN above.l1 END AS l1_above,
    CASE WHEN num_factors > 0 THEN below.sparsity END AS sparsity_below,
    CASE WHEN num_factors > 0 THEN above.sparsity END AS sparsity_above,
    CASE WHEN perplexity IS NULL OR sparsity IS NULL THEN 'its perplexity or its sparsity was not measured'
         WHEN num_factors = 0 THEN 'the run measured no fixed_l1 that saw as many tokens'
         WHEN below IS NULL
           THEN printf('its sparsity of %.2f %% is below the least of the fixed factors, %.2f %%: that would be '
                       || 'extrapolation', 100 * sparsity, 100 * least)
         WHEN above IS NULL
           THEN printf('its sparsity of %.2f %% is above the most of the fixed factors, %.2f %%: that would be '
                       || 'extrapolation', 100 * sparsity, 100 * most) END AS reason,
    variant
  FROM compared;
COMMENT ON VIEW matched_sparsity IS
  'Does progressive regularization cost less than a fixed factor? The perplexity of every progressive setting beside '
  'that of fixed factors at the same sparsity and tokens (distilled_equal_time: at the same time), ln(perplexity) taken '
  'as linear in sparsity between the two nearest factors (plain ReLU is the factor 0). Never extrapolated: then the '
  'numbers are NULL and reason says why. degrees_of_freedom are Welch and Satterthwaite''s, NULL where no seed repeats.';
