"""How a checkpoint is measured through lm-eval: corpora, benchmarks and their data."""
