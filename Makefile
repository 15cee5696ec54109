# `make demo` shows the product, `make test` proves it. The virtual environment is made once and again when pins change.
#   PYTHON    the interpreter that makes the environment, 3.11 or newer
#   PIP_ARGS  more arguments for pip, such as the --index-url or --find-links that holds the torch build for your GPU
#   WORKERS   processes that share the tests; one of them has Prefect and MLflow to itself
#   TESTS     what `make test` runs, for example TESTS=tests/curation
#   BENCHES   what `make bench` runs; DIFFUSERS_SCRIPT is the path of the script that Safelight is then compared with
#   KILLS     how often `make soak` kills a run, and of how many SEQUENCES of changes to a folder it tries whether
#             they show; SOAK is the folder that keeps the tallies
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
TESTS ?= tests
BENCHES ?= tests/benchmarks
KILLS ?= 30
SEQUENCES ?= 1000
SOAK ?= build/soak
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := flows components dashboard migrations tests

.DEFAULT_GOAL := help
.PHONY: help install demo test bench soak lint browser clean

help:
	@echo "make demo    fine-tune, evaluate and register the demo model, offline"
	@echo "make test    run every test      make lint   ruff and pyright"
	@echo "make bench   measure             make soak   kill and resume, for hours"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; pass PYTHON=python3.12 or another that is not" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/safelight demo

test: $(STAMP) browser
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m pytest $(BENCHES) -o python_files='bench_*.py' -s --timeout=0

soak: $(STAMP)
	$(BIN)/python -m tests.soak.sequences --count $(SEQUENCES) --folder $(SOAK)/sequences
	$(BIN)/python -m tests.soak.many_files --folder $(SOAK)/many-files
	$(BIN)/python -m tests.soak.writers $(SOAK)/writers
	$(BIN)/python -m tests.soak.resume --folder $(SOAK)/resume
	$(BIN)/python -m tests.soak.kills --kills $(KILLS) --folder $(SOAK)

# The dashboard's tests drive the distribution's Chromium; without one they are skipped and say so.
browser:
	@if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
		else echo "note: no Chromium here and no right to install one; the browser tests will be skipped" >&2; fi; fi

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache test-results
