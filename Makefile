# make setup | serve | test | lint | lock | settings | bench | bench-gpu. Everything lives in .venv; running a target again does
# only what is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
HOST ?= 127.0.0.1
STORE ?= demo-store
# Processes that share the tests. Each of them computes with one thread, so that two suit two cores.
TEST_WORKERS ?= 2
# Slow tests: none, part (a fifth of them, another fifth at the next commit), or all.
SLOW ?= part
VENV := .venv
BIN := $(VENV)/bin
# Made last, so that an interrupted setup is taken up again.
STAMP := $(VENV)/.installed

.PHONY: setup serve test lint lock settings bench bench-gpu clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# First and alone: its CPU-only and CUDA builds bring different dependencies, and the rest must follow it.
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,train,dev]'
	touch $@

serve: setup
	$(BIN)/python -m sera_serve.commands.demo --store $(STORE)
	$(BIN)/sera-serve serve --base embedded --store $(STORE) --host $(HOST) --port $(PORT)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --slow $(SLOW)

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi

# The image's dependencies, with the hashes of their wheels for every platform: run it after a change of pyproject.toml
# or constraints.txt.
lock: setup
	$(BIN)/python -m pip install uv==0.13.9
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,images train quant cpu otel) \
		-c constraints.txt -o requirements.lock --generate-hashes --no-annotate \
		--python-version 3.12 --python-platform linux --default-index https://pypi.org/simple \
		--custom-compile-command 'make lock'

# docs/settings.md and docs/training/options.md, from the code.
settings: setup
	$(BIN)/python -m sera_serve.commands.settings_table

bench: setup
	$(BIN)/python -m benchmarks.mixed_batch --quick

# On a GPU: what fits into six minutes, and then into five.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu first --output benchmarks/results/gpu
	$(BIN)/python -m benchmarks.gpu second --output benchmarks/results/gpu

clean:
	rm -rf $(VENV) $(STORE) build *.egg-info
