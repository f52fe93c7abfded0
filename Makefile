# Everything runs in .venv, which the first target makes: a fresh machine needs Python 3.11+ and make.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow quality bundled clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(STAMP) ## the whole loop live, in minutes: probe, tune, generate, measure, report
	$(BIN)/dpt demo

test: $(STAMP) ## fast tests, on the CPU
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## tests that train or sample, and those of the extras [app], [data] and [faiss]; CUDA's skip themselves without it
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[app,data,faiss]'
	$(BIN)/python -m pytest -m "slow or cuda"
	$(BIN)/python -m pytest tests/data/test_hub.py tests/data/test_approximate.py tests/publish/test_app.py

quality: $(STAMP) ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bundled: $(STAMP) ## train the bundled model anew, stage by stage; goes on where it stopped (a day on a CPU)
	$(BIN)/python tools/bundled/pool.py
	$(BIN)/python tools/bundled/vae.py
	$(BIN)/python tools/bundled/text.py
	$(BIN)/python tools/bundled/latents.py
	$(BIN)/python tools/bundled/unet.py
	$(BIN)/python tools/bundled/pack.py
	$(BIN)/python tools/bundled/tell.py
	$(BIN)/python tools/bundled/pack.py
	$(BIN)/dpt probe --config configs/bundled/probe.yaml
	$(BIN)/dpt tune --config configs/bundled/tune_reading.yaml
	$(BIN)/dpt tune --config configs/bundled/tune_first.yaml
	$(BIN)/dpt tune --config configs/bundled/tune_preference.yaml
	$(BIN)/dpt tune --config configs/bundled/tune.yaml
	$(BIN)/python tools/bundled/pack.py

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests tools benchmarks examples -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch first and alone, so that pip settles on the pinned wheel before anything else asks for it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
