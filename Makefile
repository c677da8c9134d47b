# The commands of this repository. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_OPTIONS ?=

# SETUP=skip uses the environment that $(PYTHON) belongs to, as it is: one with a GPU build of torch already in it, say.
ifeq ($(SETUP),skip)
RUN := $(PYTHON)
STAMP :=
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test browser lint format benchmark soak clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "options: PYTHON=python3.12  VENV=folder  SETUP=skip (use PYTHON's packages as they are)  PYTEST_OPTIONS=\"-k name\""

setup: $(STAMP) ## make .venv and install everything into it

# torch comes first and from pip, which finds a local or CPU build where the machine is set up for one; uv, many times
# faster, brings the rest, and pip stands in for it where it is not to be had.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "setup: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one that is: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "setup: $(PYTHON) cannot make an environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "setup: torch (minutes on a GPU machine: the CUDA build is large)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	@echo "setup: everything else"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv \
		&& $(VENV)/bin/python -m uv pip install --quiet --system-certs --python $(VENV)/bin/python --constraint $(CONSTRAINTS) --editable '.[dev]' \
		|| $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

quickstart: $(STAMP) ## set up, train two small models on this machine and write a report about them
	$(RUN) -m scripts.quickstart

test: lint ## set up, then lint and every test that this machine can run
	$(RUN) -m pytest $(PYTEST_OPTIONS)

browser: $(STAMP) ## the report in a headless Chromium, which has to be installed (BURNISH_CHROMIUM=path names one)
	BURNISH_BROWSER=required $(RUN) -m pytest tests/analysis/test_page.py $(PYTEST_OPTIONS)

lint: $(STAMP) ## style, types, and imports that point one way
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"
	$(RUN) -m scripts.check_imports

format: $(STAMP) ## rewrite the files in the house style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

benchmark: $(STAMP) ## tokens per second beside bare loops, Hugging Face's Trainer and litgpt, as ratios
	$(RUN) -m scripts.benchmark

soak: $(STAMP) ## most of an hour: kill a run 200 times, 50 ZeRO-3 exits, 1200 mutated recipes, checkpoints and data files
	$(RUN) -m scripts.soak --kills 200 --exits 50
	$(RUN) -m scripts.fuzz --recipes 500 --checkpoints 500 --data 200

clean: ## remove the environment and caches; runs/ and prepared/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
