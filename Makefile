# Nothing but Python >= 3.11 and make is needed: the first target that runs makes .venv and installs into it, once.
#
#   make setup      the virtual environment alone
#   make demo       the whole pipeline on the embedded world (DEMO=smoke: the small size, two minutes;
#                   SEED=1 RUN=runs/demo-1: another seed in a folder of its own)
#   make test       every test with sampled stress        (ARGS="-k masks" is handed to pytest)
#   make test-all   every test with full counts, slow ones included
#                   (CPU=avx2 or CPU=portable with either: as on a processor that has no more than that)
#   make check      ruff, mypy, import-linter             (make format repairs what ruff can repair)
#   make clean      remove .venv and the tools' caches; runs/ stays
#
# TORCH_INDEX_URL adds a package index that is searched for torch too, so that a machine without a GPU can choose the
# CPU build: make setup TORCH_INDEX_URL=<index>. Empty = pip's own configuration.

.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX_URL ?=
DEMO ?=
ARGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
CODE := ernie_elastic scripts tests
# What torch, MKL, oneDNN and our own C++ may use at most, for tests of a processor that is not here. Only MKL_CBWR
# reaches MKL on AMD. What the processor lacks no setting adds.
CPU :=
CPU_avx2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ERNIE_ELASTIC_CPU=avx2
CPU_portable := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE \
	ONEDNN_MAX_CPU_ISA=SSE41 ERNIE_ELASTIC_CPU=portable
ifneq ($(CPU),)
ifeq ($(CPU_$(CPU)),)
$(error CPU is '$(CPU)'; it may be avx2, portable or empty (this processor as it is))
endif
endif
# One thread per test process: two processes share the cores, and results do not depend on the machine. They take whole
# files in the order of tests/conftest.py, long ones first.
PYTEST := $(CPU_$(CPU)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	--durations=25 --durations-min=3

.PHONY: help setup demo test test-all check format clean

help:
	@sed -n '3,9s/^#//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer was not found; install it, or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "installing into $(VENV) (once; a few minutes)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/python -m ernie_elastic.cli demo $(if $(DEMO),--size $(DEMO)) $(if $(SEED),--seed $(SEED)) $(if $(RUN),--run-dir $(RUN))

test: setup
	$(PYTEST) $(ARGS)

test-all: setup
	STRESS=full $(PYTEST) $(ARGS)

check: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
