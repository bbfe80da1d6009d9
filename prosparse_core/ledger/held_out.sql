-- What thresholds became on text that calibration has not seen.

CREATE VIEW threshold_held_out AS
  WITH promised AS ( -- the same for every run that stands on a calibration
    FROM threshold_tradeoff WHERE chosen
    QUALIFY row_number() OVER (PARTITION BY artifact, variant, rule, scope, corpus ORDER BY run_id) = 1),
  measured AS (
    SELECT run_id, model, variant, e.key AS corpus, e.value AS perplexity, sparsity_by_corpus[e.key] AS sparsity
    FROM leaderboard, unnest(map_entries(perplexity_by_corpus)) u(e) WHERE e.key <> 'mixed'
    UNION ALL BY NAME
    SELECT run_id, model, variant, 'mixed' AS corpus, perplexity, sparsity
    FROM leaderboard WHERE perplexity IS NOT NULL),
  shifted AS (
    SELECT DISTINCT r.run_id, r.recipe, v.model, v.setting, v.variant, v.thresholds
    FROM run_artifacts r JOIN variant_facts v USING (artifact) WHERE v.thresholds IS NOT NULL)
  SELECT s.run_id, s.recipe, s.model, s.setting, s.variant, p.variant AS variant_before, p.rule, p.scope, p.threshold,
         p.cett, p.stopped_by, p.corpus, b.perplexity AS perplexity_before, m.perplexity,
         100 * (m.perplexity / b.perplexity - 1) AS perplexity_increase_pct,
         p.perplexity_increase_pct AS promised_increase_pct, b.sparsity AS sparsity_before, m.sparsity,
         m.sparsity - b.sparsity AS sparsity_gain, p.sparsity_gain AS promised_sparsity_gain, s.thresholds AS artifact
  FROM shifted s JOIN promised p ON p.artifact = s.thresholds
  JOIN measured m
    ON (m.model, m.variant, m.corpus) = (s.model, s.variant, p.corpus) AND m.run_id IS NOT DISTINCT FROM s.run_id
  JOIN measured b
    ON (b.model, b.variant, b.corpus) = (s.model, p.variant, p.corpus) AND b.run_id IS NOT DISTINCT FROM s.run_id;
COMMENT ON VIEW threshold_held_out IS
  'What the chosen thresholds cost and bring on the evaluation files, beside what the calibration files promised: by '
  'corpus, and mixed (each by its share of the training mixture). The budget holds on the calibration files only.';
