"""Questions people ask the ledger, each with the SQL that answers it."""

EXAMPLES: list[tuple[str, str]] = [
    (
        "How do the settings compare: sparsity, perplexity, accuracy?",
        "SELECT recipe, model, source_precision, setting, round(100 * sparsity, 2) AS sparsity_pct, "
        "round(perplexity, 3) AS perplexity, round(100 * accuracy, 2) AS accuracy_pct, threshold FROM leaderboard "
        "ORDER BY model, sparsity",
    ),
    (
        "How do the settings compare over seeds?",
        "SELECT run_id, setting, l1, num_seeds, round(perplexity, 3) AS perplexity, round(perplexity_sd, 3) AS sd, "
        "round(perplexity_stderr, 3) AS stderr, round(100 * sparsity, 2) AS sparsity_pct FROM comparison "
        "ORDER BY run_id, sparsity",
    ),
    (
        "Do progressive factors cost less than a fixed one at the same sparsity?",
        "SELECT run_id, setting, with_thresholds, measured, l1, sparsity, perplexity, fixed_perplexity, num_pairs, "
        "round(difference_pct, 2) AS difference_pct, round(difference_low_pct, 2) AS low_pct, "
        "round(difference_high_pct, 2) AS high_pct, no_interval FROM matched_sparsity ORDER BY ALL",
    ),
    (
        "Everything measured in the newest finished run",
        "SELECT setting, kind, name, corpus_or_task, value, unit, conditions FROM results "
        "WHERE run_id = (SELECT max_by(run_id, started_at) FROM runs WHERE status = 'done') "
        "AND kind <> 'layer_sparsity' ORDER BY ALL",
    ),
    (
        "Token perplexity of every setting on every corpus",
        "SELECT run_id, setting, corpus_or_task AS corpus, value AS perplexity, n AS num_tokens FROM results "
        "WHERE name = 'token_perplexity' AND kind = 'evaluation' ORDER BY run_id, corpus, perplexity",
    ),
    (
        "Where do we stand beside the paper?",
        "SELECT model, setting, metric, round(ours, 2) AS ours, paper, round(gap, 2) AS gap, reason, paper_model, "
        "source FROM paper_gap WHERE ours IS NOT NULL AND paper IS NOT NULL ORDER BY ALL",
    ),
    (
        "What does each threshold cost, and which was chosen?",
        "SELECT setting, rule, threshold, sparsity, perplexity, round(perplexity_increase_pct, 2) AS rise_pct, chosen "
        "FROM threshold_tradeoff WHERE corpus = 'mixed' ORDER BY run_id, setting, rule, threshold",
    ),
    (
        "What did the thresholds become on text that calibration has not seen?",
        "SELECT setting, scope, corpus, round(perplexity_increase_pct, 2) AS increase_pct, "
        "round(promised_increase_pct, 2) AS promised_pct, round(100 * sparsity_gain, 2) AS gain_pct, "
        "round(100 * promised_sparsity_gain, 2) AS promised_gain_pct FROM threshold_held_out "
        "ORDER BY run_id, setting, corpus",
    ),
    (
        "The training curve, with lambda beside the loss",
        "SELECT run_id, stage, step, tokens, l1_lambda, lm_loss, l1_term, sparsity FROM loss_curve "
        "ORDER BY run_id, step",
    ),
    (
        "Perplexity and sparsity of held-out text while it trained",
        "SELECT run_id, stage, step, corpus, perplexity, sparsity FROM held_out_curve ORDER BY run_id, step, corpus",
    ),
    (
        "Which steps were skipped or taken back, and what did checkpoints cost?",
        "SELECT stage, step, action, reason, NULL AS blocking_share FROM train_events UNION ALL BY NAME "
        "SELECT stage, num_checkpoints || ' checkpoints' AS reason, blocking_share FROM checkpoint_cost ORDER BY ALL",
    ),
    (
        "Which layers are the densest?",
        "SELECT v.setting, s.corpus, s.layer, s.sparsity, s.dead_frac FROM sparsity s "
        "JOIN variants v USING (variant) WHERE v.activation <> 'original' ORDER BY s.sparsity LIMIT 10",
    ),
    (
        "How much did L1 shrink the survivors, and which zeros remain when 8 tokens are computed at once?",
        "SELECT setting, corpus, avg(sparsity) AS sparsity, avg(chunk_sparsity) AS chunk_sparsity, "
        "avg(dead_frac) AS dead_frac, avg(survivor_ratio) AS survivor_ratio FROM shrinkage "
        "GROUP BY ALL ORDER BY corpus, sparsity",
    ),
    (
        "How much faster are the kernels, and under which conditions?",
        "SELECT kernel, provider, baseline, sparsity, round(speedup, 2) AS speedup, round(speedup_low, 2) AS at_least, "
        "round(byte_ratio, 2) AS byte_ratio, above_byte_ratio_note, d_model, d_ff, prompt_tokens, dtype, threads, "
        "timer, cpu FROM speedup WHERE is_best ORDER BY kernel, sparsity",
    ),
    (
        "How good are the predictors at each cutoff?",
        "SELECT variant, cutoff, avg(recall) AS recall, avg(predicted_sparsity) AS predicted_sparsity, "
        "avg(true_sparsity) AS true_sparsity FROM predictors WHERE coalesce(label_rule, '') NOT LIKE '%, against %' "
        "GROUP BY ALL ORDER BY variant, cutoff",
    ),
    (
        "When is a predictor worth its errors?",
        "SELECT setting, provider, cutoff, prompt_tokens, recall, round(perplexity, 2) AS perplexity, "
        "round(perplexity_increase_pct, 1) AS increase_pct, round(p50_us / 1000, 1) AS ms_per_token, "
        "round(decode_over_dense, 2) AS decode_over_dense FROM decode_tradeoff ORDER BY setting, prompt_tokens, p50_us",
    ),
    (
        "What failed, and what is the way out?",
        "SELECT run_id, step, stage, error, hint, ended_at FROM steps WHERE status = 'failed' ORDER BY ended_at DESC",
    ),
    (
        "How much time did the store save?",
        "SELECT s.step, count(*) AS reused, sum(a.wall_s) AS saved_s FROM steps s "
        "JOIN artifacts a ON (a.digest, a.fingerprint) = (s.artifact, s.fingerprint) "
        "WHERE s.status = 'cached' GROUP BY s.step ORDER BY saved_s DESC",
    ),
    (
        "What was the last evaluation made from?",
        "SELECT depth, role, step, label, path FROM lineage_of("
        "(SELECT max_by(digest, created_at) FROM artifacts WHERE step = 'evaluate'))",
    ),
    (
        "What could not be measured, and why?",
        "SELECT run_id, setting, corpus_or_task, conditions->>'note' AS reason FROM results "
        "WHERE kind = 'evaluation' AND value IS NULL ORDER BY ALL",
    ),
    (
        "What does a column mean?",
        "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() "
        "WHERE table_name = 'leaderboard' ORDER BY column_index",
    ),
]
