# `make help` lists the targets. Variables: PYTHON (the Python to use), TORCH_INDEX (package index to take PyTorch from),
# PROMPT (for `make demo`), PYTEST_ARGS (for `make test`, such as PYTEST_ARGS="-k split"), PROCESSES (that tests run on; 0: one
# after another in pytest's own).
BIN := .venv/bin
PYTHON ?=
TORCH_INDEX ?=
PYTEST_ARGS ?=
PROCESSES ?= 2
PROMPT ?= Why is the sky blue?
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint gpu clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv with the phalanx command in it; instant where it stands
	@PYTHON='$(PYTHON)' sh scripts/setup.sh --torch-index '$(TORCH_INDEX)'

demo: setup ## Run a small model over four ranks in a 2 x 2 layout
	$(BIN)/phalanx generate configs/demo.yaml --chat -p "$$PROMPT"

# import-linter without its cache, which keeps what an import meant before a module that it names was added or removed.
lint: setup ## Check style, formatting, types and the floors between the rooms
	@echo "lint 1/4: ruff check" && $(BIN)/ruff check .
	@echo "lint 2/4: ruff format" && $(BIN)/ruff format --check .
	@echo "lint 3/4: mypy" && $(BIN)/mypy
	@echo "lint 4/4: import-linter" && $(BIN)/lint-imports --no-logo --no-cache

# Files are dealt out in the order that tests/turns.py gives them. A thread that waits for others of PyTorch's leaves its core
# to the other process: one rank with two threads beside a busy process generates in 0.7 of the time.
test: setup lint ## Lint, then run every test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder \
		--durations=10 --durations-min=2 $(PYTEST_ARGS)

# On a machine with a GPU, from the checkout: with PYTHON if given, else .venv where that is made, else the machine's own.
gpu: ## Test and measure everything on this machine's GPU, in under 10 minutes; installs nothing
	@PYTHONPATH=src $(or $(PYTHON),$(wildcard $(BIN)/python),python3) -m benchmarks.gpu

clean: ## Remove caches and build outputs
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf .venv
