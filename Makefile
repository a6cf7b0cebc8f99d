# What people type. `make help` lists it; every target can be run twice.
PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch, before anything else. TORCH=system uses the torch that PYTHON already
# has (a GPU machine's own build); any other value goes to pip as it is, with its options.
TORCH ?= torch==2.13.0
# Where the tested versions stand, a file for each Python. CONSTRAINTS=none: whatever is newest.
CONSTRAINTS ?= constraints
WHEELHOUSE ?= wheelhouse
EXTRAS ?= dev,data,oracle,tensorboard
ARGS ?=
# Processes that run the tests.
WORKERS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install install-dev demo chat-demo test test-long test-faults test-latest check format bench bench-gpu \
	gpu-call wheelhouse constraints docs clean distclean

RUNTIME := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.installed-dev
BIN := $(VENV)/bin
# Written after torch is in: nothing installed later may pull another one, or a version not tested.
PIN := $(VENV)/constraints.txt
# DeepSpeed as a pure wheel: its operators are never built here, and building them needs a compiler.
# Builds are held to the same versions: older pips read the first variable for them, newer the last.
# Both are lists that spaces part, so the file is named as an address.
EMPTY :=
PIN_URL := file://$(subst $(EMPTY) $(EMPTY),%20,$(abspath $(PIN)))
PIP := DS_BUILD_OPS=0 PIP_CONSTRAINT="$(PIN_URL) $${PIP_CONSTRAINT:-}" PIP_BUILD_CONSTRAINT=$(PIN_URL) \
	$(BIN)/python -m pip install --disable-pip-version-check -q
MEGAHYBRID := $(BIN)/megahybrid
DEMO := build/demo
# The demo's two tensor ranks need a device each; with a single GPU one rank does it all.
LOCAL_RANKS := import torch; print('--processes 1 parallel.tensor=1' if torch.cuda.device_count() == 1 else '--processes 2')

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(RUNTIME) ## .venv with megahybrid (PYTHON=python3.12, TORCH=system)

install-dev: $(DEVELOPMENT) ## the same, and what tests and checks need

$(PIN): pyproject.toml .ci/pin $(wildcard $(CONSTRAINTS)/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing) (megahybrid needs Python 3.11 or newer). Use for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 2; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages,) $(VENV) || { \
		echo "PYTHON=$(PYTHON) cannot make a virtual environment (its venv or ensurepip is missing). On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 2; }
ifeq ($(TORCH),system)
	@$(PYTHON) .ci/parent $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "TORCH=system, but PYTHON=$(PYTHON) has no torch. Leave TORCH out to install one." >&2; \
		exit 2; }
else
	@echo "Installing $(TORCH)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(TORCH)
endif
	@$(BIN)/python .ci/pin $@.new $(CONSTRAINTS)
	@mv $@.new $@

$(RUNTIME): $(PIN)
	@echo "Installing megahybrid beside $$(head -1 $(PIN))"
	@$(PIP) setuptools wheel
	@$(PIP) -e .
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	@echo "Installing what tests and checks need"
	@$(PIP) -e ".[$(EXTRAS)]"
	@touch $@

# What is there already stays: a second `make demo` goes on with the run it finds.
demo: $(RUNTIME) ## from raw text to a lengthened context on this machine, 5 to 9 minutes on 2 cores
	$(MEGAHYBRID) data demo
	$(MEGAHYBRID) describe configs/runs/demo.yaml
	$(MEGAHYBRID) train configs/runs/demo.yaml $$($(BIN)/python -c "$(LOCAL_RANKS)")
	$(MEGAHYBRID) evaluate runs/demo
	$(MEGAHYBRID) sample runs/demo --prompt "def " | tee runs/demo/samples.txt
	$(MEGAHYBRID) report runs/demo
	@echo
	@echo "The run:    runs/demo/            its resolved config, ledger, checkpoints and logs"
	@echo "The report: runs/demo/report/     report.html, and each plot as a picture"
	@echo "The data:   $(DEMO)/data/     look at it: $(MEGAHYBRID) data inspect $(DEMO)/data/train"
	@echo "Try next:"
	@echo "  $(MEGAHYBRID) sample runs/demo --prompt 'import ' --tokens 200"
	@echo "  $(MEGAHYBRID) train configs/runs/demo.yaml --processes 1 parallel.tensor=1 directory=runs/one"
	@echo "      the same run in a single process: compare the losses in runs/*/ledger.jsonl"
	@echo "  $(MEGAHYBRID) describe configs/runs/command_a.yaml"
	@echo "      what a large one would cost"

chat-demo: demo ## the demo, then conversations until its answers end; some minutes more
	$(MEGAHYBRID) data demo --chats
	$(MEGAHYBRID) train configs/runs/demo_chat.yaml --processes 1
	$(MEGAHYBRID) evaluate runs/demo_chat
	$(MEGAHYBRID) evaluate runs/demo_chat chat
	printf '%s\n' "Which module has deque?" "Count from 3 to 7." | $(MEGAHYBRID) sample runs/demo_chat --chat chatml --temperature 0
	@echo
	@echo "Talk to it: $(MEGAHYBRID) sample runs/demo_chat --chat chatml"

# Two processes, each with pools of up to 8 ranks of its own; a file's tests stay together, so that
# what they share is made once.
SUITE = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(DEVELOPMENT) ## the test suite (ARGS="-k window" passes options to pytest; WORKERS=0: one process)
	@$(SUITE) -m "not long" $(ARGS)

test-long: $(DEVELOPMENT) ## what takes longest and is covered in part by `make test`
	@$(SUITE) -m long $(ARGS)

test-faults: $(DEVELOPMENT) ## ranks killed and hung, nodes lost, on this machine and on a Slurm of its own
	@$(BIN)/python -m pytest tests/faults $(ARGS)

# An environment of its own, and never a reason not to merge: it reports, and ends well.
test-latest: ## the suite with the newest of everything: what moved, what broke (build/latest)
	@$(PYTHON) .ci/latest build/latest "$(EXTRAS)" "$(if $(filter file,$(origin TORCH)),,$(TORCH))" $(ARGS)

check: $(DEVELOPMENT) ## format, lint, types, and who may import whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(DEVELOPMENT) ## rewrite the sources as `check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(DEVELOPMENT) ## our step against Hugging Face's Cohere2, growth with length, memory; CPU, 10 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.train_step $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.start_up

bench-gpu: $(DEVELOPMENT) ## every measurement on one GPU, a process for each (ARGS="--only hybrid"; EXTRAS with peers)
	@$(BIN)/python -u -m benchmarks.gpu_call $(ARGS)

# PYTHON is the other machine's version here, so this one needs its environment already.
gpu-call: ## fill .whl/ with what a lent GPU machine lacks, print the line to run there (PYTHON=3.12)
	@test -f $(DEVELOPMENT) || { echo "$(VENV) is not installed yet. First: make install-dev" >&2; exit 2; }
	@DS_BUILD_OPS=0 $(BIN)/python .ci/wheelhouse "$(if $(filter file,$(origin PYTHON)),3.12,$(PYTHON))" .whl \
		dev,gpu,oracle,peers --there benchmarks/gpu_call/machine.txt \
		--left-out benchmarks/gpu_call/left_out.txt --most-mib 20

wheelhouse: ## wheels for an offline GPU machine (PYTHON=3.12: that machine's); make install-dev first
	@test -f $(DEVELOPMENT) || { echo "$(VENV) is not installed yet. First: make install-dev" >&2; exit 2; }
	@DS_BUILD_OPS=0 $(BIN)/python .ci/wheelhouse "$(PYTHON)" "$(WHEELHOUSE)" "$(EXTRAS)"

# uv resolves for a Python that is not here; it has an environment of its own.
constraints: ## write constraints/ anew: the newest versions that pyproject.toml allows
	@test -x build/uv/bin/uv || { $(PYTHON) -m venv build/uv && \
		build/uv/bin/python -m pip install --disable-pip-version-check -q "uv>=0.9,<0.14"; }
	@$(PYTHON) .ci/constraints build/uv/bin/uv

docs: $(RUNTIME) ## write the reference of the run file from its classes
	@$(BIN)/python -m megahybrid.config.reference > docs/config.md.new
	@mv docs/config.md.new docs/config.md

clean: ## remove caches and build products, keep runs and .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find megahybrid data_prep tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## also remove .venv and the wheels collected
	@rm -rf $(VENV) $(WHEELHOUSE) .whl
