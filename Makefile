# make venv     create .venv and install autocomp into it
# make search   the default job: compress the embedded model to 15 ms
# make test     run every test
# make check    lint, format, types, and the direction of imports

PYTHON ?= python3
BUDGET ?= 15ms
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin

.PHONY: venv search test check format clean

venv: .venv/.base

search: venv
	$(BIN)/autocomp search --budget $(BUDGET)

# One thread a worker: two workers share two cores.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy autocomp benchmarks
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; found = sys.version_info[:2]; sys.exit(None if (3, 11) <= found <= (3, 13) else \
	  "autocomp needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: name another, as in make venv PYTHON=python3.12" % found)'
	$(PYTHON) -m venv .venv

# The files .base, .test and .dev mark what is installed. An extra brings the base with it, so that whichever
# target comes first downloads everything in one go.
.venv/.base: pyproject.toml | $(BIN)/python
	@echo 'Installing into .venv; the first time takes minutes, for torch is large.'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable .
	@touch $@

.venv/.test .venv/.dev: .venv/.%: pyproject.toml | $(BIN)/python
	@echo 'Installing into .venv; the first time takes minutes, for torch is large.'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$*]'
	@touch .venv/.base $@
