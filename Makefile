# `make demo` and `make test` work as the first command on a fresh machine with Python 3.11, 3.12 or 3.13:
# they make .venv, install into it with pip, and run. Nothing outside this folder is written but caches.

# The first interpreter that runs and is new enough; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
# For example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a CPU-only torch.
PIP_ARGS ?=
# Test processes. Each runs torch on one thread: on two cores that beats one process with two threads.
JOBS ?= 2
DEMO_OUT ?= runs/demo
TORTURE_REPORT ?= runs/torture.jsonl

VENV := .venv
BIN := $(VENV)/bin
# The exact versions the tests passed with; `make constraints` renews them. `make CONSTRAINTS= ...` installs without.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
EXACT := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help install demo test test-all torture torture-full bench mutants probes check lint format clean constraints latest lowest docs

help:
	@echo "make demo      three routers on three probes and on text, two seeds each (at most 6 minutes on two cores)"
	@echo "make test      the quick tests and doctests"
	@echo "make test-all  every test, the slow ones too"
	@echo "make torture   kills, damage, full disks, hostile inputs: the table of docs/reliability.md (under 30 minutes)"
	@echo "make torture-full  the same with five times the kills and an hour of fuzzing"
	@echo "make mutants   one small fault at a time: which of a fixed sample no test sees (about an hour on one core)"
	@echo "make probes    the whole zoo on all probes, eight seeds (two to five hours of one core); resumes"
	@echo "make bench     measure speed and memory against transformers' models; writes benchmarks/results"
	@echo "make check     lint, formatting, types, imports, security, then the quick tests (what CI runs)"
	@echo "make docs      build the documentation site into site/, links and anchors checked"
	@echo "make latest    the same with the newest release of everything, caps ignored, in an environment of its own"
	@echo "make lowest    the same with the lowest releases declared"
	@echo "make constraints  renew constraints.txt, the exact versions that make demo and make test install"
	@echo "make format    rewrite the code as the formatter wants it"
	@echo "make clean     remove .venv and the tools' caches"

# --- installation: a stamp per set of extras, renewed when the requirements change --------------------------------

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; give one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(EXACT) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(EXACT) -e ".[dev,data,serve,finetune]"
	@touch $@

# What the slow tests of grids need beside: Ray and submitit.
$(VENV)/.installed-all: $(VENV)/.installed-dev
	$(PIP) $(EXACT) -e ".[dev,data,serve,finetune,ray,slurm]"
	@touch $@

install: $(VENV)/.installed-dev

# --- what it is for ------------------------------------------------------------------------------------------------

demo: $(VENV)/.installed
	$(BIN)/rmoe probe --routers smoe,rmoe,rmoe-np --probes lookup,carry,integrate --seeds 2 --out $(DEMO_OUT)-probes
	$(BIN)/rmoe compare --preset quick --routers smoe,rmoe,rmoe-np --seeds 2 --out $(DEMO_OUT)
	@cat $(DEMO_OUT)-probes/summary.md
	@cat $(DEMO_OUT)/summary.md
	@echo "reports: $(abspath $(DEMO_OUT))-probes/report/index.html and $(abspath $(DEMO_OUT))/report/index.html"

test: $(VENV)/.installed-dev
	$(PYTEST)

test-all: $(VENV)/.installed-all
	$(PYTEST) -m ""

# One process: the kills are timed, and the fuzzer takes a core for itself. TORTURE="-k kill" (damage, disk, malformed,
# fuzzer, parallel, serving) runs a part.
TORTURE ?=
TORTURE_TESTS := tests/torture tests/parallel/test_gradients.py tests/parallel/test_launch.py tests/training/test_ranks.py \
	tests/serving
torture: LEVEL = normal
torture-full: LEVEL = full
torture torture-full: $(VENV)/.installed-dev
	@mkdir -p $(dir $(TORTURE_REPORT)) && rm -f $(TORTURE_REPORT)
	RMOE_TORTURE=$(LEVEL) RMOE_TORTURE_REPORT=$(abspath $(TORTURE_REPORT)) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m "" --durations 15 $(TORTURE_TESTS) $(TORTURE)
	@$(BIN)/python -m tests.torture.table $(TORTURE_REPORT)

# Refuses what its own tests do not vouch for. About an hour and a half on two cores, the tests included; a part of the
# suite is BENCH="--cases step block --sizes quick", and parts of one day go into one file.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.suite $(BENCH)
	$(BIN)/python -m benchmarks.sharing --out benchmarks/results
	cd benchmarks && for case in mutual_information recording_overhead graft_cost; do \
		$(abspath $(BIN))/python $$case.py --out results || exit 1; done

# MUTANTS="--changed main": every mutant of the covered files that differ from a commit. See docs/mutants.md.
MUTANTS ?=
mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants $(MUTANTS)

PROBES_OUT ?= runs/probes
probes: $(VENV)/.installed-dev
	$(BIN)/rmoe probe --plugin experiments/probe_routers.py --routers all,smoe-mlp-matched,eda-linear-unnormed,gated-linear-full-softmax,rmoe-np-full-softmax --seeds 8 --out $(PROBES_OUT)
	$(BIN)/rmoe probe --routers smoe,rmoe,smoe-bias,rmoe-bias --probes zipf --seeds 8 --sweep balance=0.01,0,0.1 --out $(PROBES_OUT)
	$(BIN)/python -m experiments.cards $(PROBES_OUT)
	$(BIN)/python -m experiments.mechanisms $(PROBES_OUT) --out experiments/results/mechanisms.md

check: lint test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml rmoe

# --- documentation -------------------------------------------------------------------------------------------------

# An environment without torch: the reference is read from the source.
.venv-docs/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) tools/requirements.py docs > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) $(EXACT) --requirement .venv-docs/requirements.txt
	@touch $@

docs: .venv-docs/.installed
	cd tools && $(abspath .venv-docs)/bin/python -m doctest docstrings.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "site: $(abspath site)/index.html"

# --- other versions ------------------------------------------------------------------------------------------------

# A failure says what broke, and which releases differ from the pinned ones.
latest lowest:
	rm -rf .venv-$@
	$(PYTHON) -m venv .venv-$@
	$(PYTHON) tools/requirements.py $@ > .venv-$@/requirements.txt
	.venv-$@/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --requirement .venv-$@/requirements.txt
	.venv-$@/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch .venv-$@/.installed .venv-$@/.installed-dev .venv-$@/.installed-all
	.venv-$@/bin/python -m pip freeze --exclude-editable | diff constraints.txt - || true
	$(MAKE) VENV=.venv-$@ check

# On the lowest Python, whose releases all three have; a local version (torch's +cpu) is this machine's, not everyone's.
# torch stays at the release named here, the newest with a wheel for a CPU alone on the machines this project is tested on.
TORCH := 2.13.0
constraints:
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) torch==$(TORCH) \
		-e ".[dev,data,serve,finetune,eval,track,docs,ray,slurm]"
	{ echo "# The exact versions that make demo and make test install. Made by make constraints."; \
		.venv-constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt
	rm -rf .venv-constraints

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-docs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
