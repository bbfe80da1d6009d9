"""The ProSparse method (arXiv 2402.13516): activations, regularization, schedules, thresholds, data, training.

Importable without prefect, duckdb (outside ``prosparse_core.ledger``), lm-eval or triton.
"""
