-- The ledger's tables. Rows are only ever added: what can be derived is a view (views.sql).
-- A fact belongs to the artifact it was measured in (`artifact` is that artifact's digest); a run shows the facts of
-- every artifact one of its steps made or reused. The meaning of each column is in columns.csv.
-- No PRIMARY KEY: its index is all that would keep duckdb 1.0 from opening the file; the writer, alone under its lock,
-- looks before it adds. Raise the version in schema.py only when a column changes its meaning; new columns and views
-- need nothing.

CREATE TABLE schema_version (version INTEGER NOT NULL, signature VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL);
COMMENT ON TABLE schema_version IS 'Which version of the schema made this file.';

-- What ran. A start and an end are two rows; runs and steps are views over them.
CREATE TABLE run_starts (
  run_id VARCHAR NOT NULL, flow VARCHAR NOT NULL, recipe VARCHAR NOT NULL, recipe_yaml VARCHAR NOT NULL,
  overrides VARCHAR[] NOT NULL, model VARCHAR NOT NULL, host VARCHAR, pid BIGINT, started_at TIMESTAMP NOT NULL,
  provenance JSON NOT NULL
);
COMMENT ON TABLE run_starts IS 'One row per run begun; ask the view runs.';

CREATE TABLE run_ends (
  run_id VARCHAR NOT NULL, status VARCHAR NOT NULL CHECK (status IN ('done', 'failed')), ended_at TIMESTAMP NOT NULL,
  error VARCHAR
);
COMMENT ON TABLE run_ends IS 'One row per run ended; ask the view runs.';

CREATE TABLE step_starts (
  step_id VARCHAR NOT NULL, run_id VARCHAR NOT NULL, step VARCHAR NOT NULL, stage INTEGER, label VARCHAR NOT NULL,
  fingerprint VARCHAR NOT NULL, started_at TIMESTAMP NOT NULL
);
COMMENT ON TABLE step_starts IS 'One row per step begun; ask the view steps.';

CREATE TABLE step_ends (
  step_id VARCHAR NOT NULL, status VARCHAR NOT NULL CHECK (status IN ('done', 'cached', 'failed')), artifact VARCHAR,
  ended_at TIMESTAMP NOT NULL, error VARCHAR, hint VARCHAR
);
COMMENT ON TABLE step_ends IS 'One row per step ended; ask the view steps.';

-- What was made.
CREATE TABLE artifacts (
  digest VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, step VARCHAR NOT NULL, label VARCHAR NOT NULL,
  path VARCHAR NOT NULL, bytes BIGINT NOT NULL, num_files INTEGER NOT NULL, created_at TIMESTAMP NOT NULL,
  wall_s DOUBLE, payload JSON NOT NULL, provenance JSON NOT NULL, meta JSON NOT NULL
);
COMMENT ON TABLE artifacts IS
  'One row per finished step folder of the store: what decided it, where it lies, how big it is.';

CREATE TABLE lineage (
  artifact VARCHAR NOT NULL, step VARCHAR NOT NULL, role VARCHAR NOT NULL, input VARCHAR NOT NULL, input_step VARCHAR,
  input_fingerprint VARCHAR
);
COMMENT ON TABLE lineage IS 'One row per input of an artifact; lineage_of(digest) follows them to the source.';

CREATE TABLE retention (
  artifact VARCHAR NOT NULL, path VARCHAR NOT NULL, event VARCHAR NOT NULL CHECK (event IN ('dropped', 'made again')),
  bytes BIGINT NOT NULL, happened_at TIMESTAMP NOT NULL, reason VARCHAR
);
COMMENT ON TABLE retention IS
  'One row per file that runtime.keep: last took from an artifact, or that was made again; lineage_of says what is gone.';

CREATE TABLE variant_facts (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, model VARCHAR NOT NULL, setting VARCHAR NOT NULL,
  activation VARCHAR, checkpoint VARCHAR, thresholds VARCHAR, tokens_seen BIGINT, seed BIGINT, l1 DOUBLE,
  source_precision VARCHAR
);
COMMENT ON TABLE variant_facts IS 'Which variants an artifact measures; ask the view variants.';

-- What was measured.
CREATE TABLE train_metrics (
  artifact VARCHAR NOT NULL, stage INTEGER, step BIGINT NOT NULL, tokens BIGINT, l1_lambda DOUBLE, lr DOUBLE,
  lm_loss DOUBLE, l1 DOUBLE, l1_term DOUBLE, mean_abs_x1 DOUBLE, sparsity DOUBLE, grad_norm DOUBLE,
  tokens_per_s DOUBLE, wall_s DOUBLE, distill DOUBLE, skipped VARCHAR
);
COMMENT ON TABLE train_metrics IS 'The training log: one row per logged optimizer step of a stage.';

CREATE TABLE held_out_metrics (
  artifact VARCHAR NOT NULL, stage INTEGER NOT NULL, step BIGINT NOT NULL, corpus VARCHAR NOT NULL,
  num_tokens BIGINT NOT NULL, lm_loss DOUBLE, sparsity DOUBLE
);
COMMENT ON TABLE held_out_metrics IS
  'Looks at a few held-out windows of every corpus while a stage trains; ask the view held_out_curve.';

CREATE TABLE train_events (
  artifact VARCHAR NOT NULL, stage INTEGER NOT NULL, step BIGINT NOT NULL,
  action VARCHAR NOT NULL CHECK (action IN ('skip', 'rollback', 'fail', 'ignore')), reason VARCHAR NOT NULL,
  lm_loss DOUBLE, grad_norm DOUBLE, first_step BIGINT
);
COMMENT ON TABLE train_events IS
  'One row per bad step of a stage: a loss or gradient that was not finite, or a spike, and what the rule did.';

CREATE TABLE checkpoint_writes (
  artifact VARCHAR NOT NULL, stage INTEGER NOT NULL, step BIGINT NOT NULL, bytes BIGINT NOT NULL,
  blocking_s DOUBLE NOT NULL, write_s DOUBLE NOT NULL
);
COMMENT ON TABLE checkpoint_writes IS
  'One row per checkpoint written while a stage trained; ask the view checkpoint_cost.';

CREATE TABLE sparsity (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, corpus VARCHAR NOT NULL,
  layer INTEGER NOT NULL CHECK (layer >= 0), threshold DOUBLE, num_tokens BIGINT NOT NULL,
  sparsity DOUBLE NOT NULL CHECK (sparsity BETWEEN 0 AND 1), dead_frac DOUBLE, mean_abs_x1 DOUBLE,
  mean_abs_live DOUBLE, chunk_sparsity DOUBLE
);
COMMENT ON TABLE sparsity IS
  'Share of exact zeros in x1 by variant, corpus and layer. Means over layers are in results and leaderboard.';

CREATE TABLE thresholds (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, rule VARCHAR NOT NULL, scope VARCHAR NOT NULL,
  threshold DOUBLE NOT NULL, corpus VARCHAR NOT NULL, num_tokens BIGINT NOT NULL, perplexity DOUBLE, sparsity DOUBLE,
  chosen BOOLEAN NOT NULL, cett DOUBLE, stopped_by VARCHAR
);
COMMENT ON TABLE thresholds IS
  'The calibration curve: what every tried FATReLU threshold cost in perplexity and brought in sparsity.';

CREATE TABLE evaluations (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, task VARCHAR, corpus VARCHAR, metric VARCHAR NOT NULL,
  value DOUBLE, stderr DOUBLE, n BIGINT, num_fewshot INTEGER, "limit" BIGINT, batch_size INTEGER, dtype VARCHAR,
  harness_version VARCHAR, higher_is_better BOOLEAN, headline BOOLEAN, note VARCHAR, share DOUBLE,
  window_tokens BIGINT, num_documents BIGINT,
  CHECK (task IS NOT NULL OR corpus IS NOT NULL), CHECK (value IS NOT NULL OR note IS NOT NULL)
);
COMMENT ON TABLE evaluations IS
  'Perplexities by corpus and benchmark scores by task. A NULL value is n/a, and note says why.';

CREATE TABLE document_scores (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, task VARCHAR, corpus VARCHAR, metric VARCHAR NOT NULL,
  part_of VARCHAR, share DOUBLE, dtype VARCHAR, num_fewshot INTEGER, window_tokens BIGINT,
  documents VARCHAR NOT NULL, sums DOUBLE[] NOT NULL, counts DOUBLE[] NOT NULL,
  CHECK (task IS NOT NULL OR corpus IS NOT NULL)
);
COMMENT ON TABLE document_scores IS
  'What each document contributed to a score: what differences between variants are resampled from, for all read the '
  'same documents.';

-- The only derived numbers that are rows: no SQL draws the same samples in every version. Made when an evaluation is
-- recorded, from document_scores alone, and made again alike when the ledger is rebuilt.
CREATE TABLE differences (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, base_artifact VARCHAR NOT NULL, base VARCHAR NOT NULL,
  task VARCHAR, corpus VARCHAR, metric VARCHAR NOT NULL, unit VARCHAR NOT NULL, value DOUBLE, low DOUBLE, high DOUBLE,
  stderr DOUBLE, num_documents BIGINT NOT NULL, note VARCHAR
);
COMMENT ON TABLE differences IS
  'Every difference between two variants that read the same documents, with its 95 % interval from a paired bootstrap '
  'by document; ask the view variant_differences.';

CREATE TABLE predictors (
  artifact VARCHAR NOT NULL, variant VARCHAR NOT NULL, layer INTEGER NOT NULL CHECK (layer >= 0),
  cutoff DOUBLE NOT NULL, hidden INTEGER, label_rule VARCHAR, recall DOUBLE, predicted_sparsity DOUBLE,
  true_sparsity DOUBLE, num_tokens BIGINT
);
COMMENT ON TABLE predictors IS 'How well the activation predictors find the active neurons, by layer and cutoff.';

CREATE TABLE speed (
  artifact VARCHAR NOT NULL, kernel VARCHAR NOT NULL, provider VARCHAR NOT NULL, variant VARCHAR, d_model INTEGER,
  d_ff INTEGER, num_tokens BIGINT, dtype VARCHAR NOT NULL, sparsity DOUBLE, mask_source VARCHAR, threads INTEGER,
  timer VARCHAR NOT NULL, cache VARCHAR, p20_us DOUBLE, p50_us DOUBLE, p80_us DOUBLE, num_reps INTEGER, gbps DOUBLE,
  rel_err DOUBLE, gate_passed BOOLEAN, byte_ratio DOUBLE, tokens_per_s DOUBLE, layer INTEGER, host VARCHAR,
  cpu VARCHAR, device VARCHAR, note VARCHAR, live_frac DOUBLE, bandwidth_share DOUBLE, cutoff DOUBLE,
  prompt_tokens INTEGER, weights_bytes BIGINT, cache_bytes BIGINT, byte_ratio_note VARCHAR
);
COMMENT ON TABLE speed IS
  'Every timing, with all its conditions. Ratios are in the view speedup, which compares like with like only.';

CREATE TABLE published (
  model VARCHAR NOT NULL, setting VARCHAR NOT NULL, metric VARCHAR NOT NULL, condition VARCHAR NOT NULL,
  value DOUBLE NOT NULL, unit VARCHAR NOT NULL, source VARCHAR NOT NULL
);
COMMENT ON TABLE published IS
  'The numbers the authors printed, each with its table; percentages and microseconds as printed.';
