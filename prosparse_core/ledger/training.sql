-- What a stage was seen to do while it trained, beside its loss (loss_curve).

CREATE VIEW held_out_curve AS
  SELECT r.run_id, r.recipe, r.model, h.stage, h.step, t.tokens, t.l1_lambda, h.corpus, h.num_tokens, h.lm_loss,
         exp(h.lm_loss) AS perplexity, h.sparsity, h.artifact
  FROM (FROM held_out_metrics
        UNION ALL BY NAME
        SELECT artifact, stage, step, 'mixed' AS corpus, sum(num_tokens)::BIGINT AS num_tokens,
               sum(lm_loss * num_tokens) / sum(num_tokens) AS lm_loss,
               sum(sparsity * num_tokens) / sum(num_tokens) AS sparsity
        FROM held_out_metrics GROUP BY ALL) h
  JOIN run_artifacts r USING (artifact)
  LEFT JOIN train_metrics t ON (t.artifact, t.stage, t.step) = (h.artifact, h.stage, h.step);
COMMENT ON VIEW held_out_curve IS
  'Held-out perplexity and sparsity during training, by corpus, and mixed (each token counting once). A few windows of '
  'the calibration files: compare steps, not models; results has the evaluation files.';

CREATE VIEW checkpoint_cost AS
  SELECT r.run_id, r.recipe, r.model, c.stage, count(*) AS num_checkpoints, max(c.bytes) AS bytes,
         sum(c.blocking_s) AS blocking_s, sum(c.write_s) AS write_s,
         sum(c.blocking_s) / (any_value(t.wall_s) + sum(c.blocking_s)) AS blocking_share, c.artifact
  FROM checkpoint_writes c JOIN run_artifacts r USING (artifact)
  LEFT JOIN (SELECT artifact, sum(wall_s) AS wall_s FROM train_metrics GROUP BY artifact) t USING (artifact)
  GROUP BY r.run_id, r.recipe, r.model, c.stage, c.artifact;
COMMENT ON VIEW checkpoint_cost IS
  'What the checkpoints of each stage cost: number, size, and the share of the time that training waited for them.';
