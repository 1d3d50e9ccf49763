# make demo     captions of the example images by the model that ships
# make test     the quick tests;  make test-full: all of them, and the quick ones on the lowest versions
# make help     the rest

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
FILES := blip2 tests docs default_model benchmarks
RUN ?= runs/default
DATA ?= data
STAGES := names features language queries finetune stage1 export

.DEFAULT_GOAL := help
.PHONY: help chromium zsh fish install demo test test-full test-lowest lint format types docs default-model eval-data clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The pinned file first: it names the torch build, so that the package's own looser bound pulls in no other.
$(VENV)/.base: requirements/base.txt pyproject.toml
	@echo "Installing blip2 and what it needs into $(VENV) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements/base.txt
	@$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.train: $(VENV)/.base requirements/train.txt
	@$(PIP) install -r requirements/train.txt
	@touch $@

$(VENV)/.eval: $(VENV)/.train requirements/eval.txt
	@$(PIP) install -r requirements/eval.txt
	@touch $@

$(VENV)/.test: $(VENV)/.train requirements/eval.txt requirements/serve.txt requirements/test.txt
	@echo "Installing what the tests need into $(VENV) ..." >&2
	@$(PIP) install -r requirements/test.txt
	@touch $@

$(LOWEST)/.lowest: requirements/lowest.txt requirements/base.txt pyproject.toml
	@echo "Installing the lowest versions of what blip2 needs into $(LOWEST) ..." >&2
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip -qq --disable-pip-version-check install \
		"$$(grep '^torch==' requirements/base.txt)" -r requirements/lowest.txt
	@$(LOWEST)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --editable .
	@touch $@

# The page is tested in a real browser, completion in real shells, Debian's. Those tests are skipped where one is missing
# and cannot be installed.
chromium zsh fish:
	@command -v $@ >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "Installing $@, for the tests ..." >&2 && \
		apt-get update -qq && apt-get install -qq --yes --no-install-recommends $@; \
	} >/dev/null || echo "No $@ here, and it cannot be installed: its tests are skipped" >&2

install: $(VENV)/.base ## blip2 in a virtual environment ($(VENV))

demo: $(VENV)/.base ## captions of the example images
	@$(BIN)/blip2 caption examples

test: $(VENV)/.test chromium zsh fish ## the quick tests
	$(BIN)/python -m pytest

test-full: $(VENV)/.test chromium zsh fish ## every test, the long ones too; then test-lowest
	$(BIN)/python -m pytest -m ""
	$(MAKE) test-lowest

test-lowest: $(LOWEST)/.lowest chromium zsh fish ## the quick tests on the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check $(wildcard $(FILES))
	$(BIN)/ruff format --check $(wildcard $(FILES))

format: $(VENV)/.test ## let ruff put the files in order
	$(BIN)/ruff check --fix $(wildcard $(FILES))
	$(BIN)/ruff format $(wildcard $(FILES))

types: $(VENV)/.test ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.base ## write docs/cli.md from the command line's help, the table of docs/architecture.md from docs/layout.toml
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_architecture.py

default-model: $(VENV)/.train ## make the default model anew: hours; goes on where it was stopped
	$(BIN)/python -m default_model.materials $(RUN)
	$(BIN)/python -m default_model.vocab $(RUN)
	for stage in $(STAGES); do $(BIN)/python -m default_model.stages $$stage $(RUN) || exit; done
	$(BIN)/python -m default_model.calibrate $(RUN) --model $(RUN)/default

eval-data: $(VENV)/.eval ## what `blip2 eval default` needs, into ./data: easy-VQA, and scenes composed of downloaded pictures
	$(BIN)/python -m default_model.materials $(DATA) --scenes
	$(BIN)/python -m default_model.make_scenes $(DATA)

clean: ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
