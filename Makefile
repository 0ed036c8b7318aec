# Two commands from a bare machine with python3, make and a C++ compiler:  make test,  make bench.

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
PIP_ARGS ?=
FULL ?=

# With the packages of the system in sight, a torch that is there is taken.
TORCH_PINNED := torch==2.13.0
TORCH_SPEC ?= $(if $(findstring --system-site-packages,$(VENV_ARGS)),torch>=2.11,$(TORCH_PINNED))
TRITON_SPEC ?= $(if $(filter x86_64,$(shell uname -m)),$(if $(filter $(TORCH_PINNED),$(TORCH_SPEC)),triton==3.7.1,triton>=3.6))

RUN := $(VENV)/bin/python
EVERYTHING := $(filter-out 0,$(FULL))
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1))")
PYTEST := $(RUN) -m pytest $(if $(EVERYTHING),--full) $(PYTEST_ARGS)
# Several processes at a time: most tests keep one core busy. Threads that wait do not spin, or they would take the other's.
PARALLEL := OMP_WAIT_POLICY=PASSIVE $(PYTEST) $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)
AND_QUICK := $(if $(EVERYTHING),, and not full)
ALL := $(if $(EVERYTHING),,not full)
# With FULL=1 the cases of the CPU kernels are given to the Triton kernels too: a part of them, because that is slow.
SHARED_CASES := (accuracy or strides or dtypes) and not full
SHARED_FILES := tests/test_hessian.py tests/test_langevin.py
SETUP = $(PYTHON) build_tools/environment.py --venv "$(VENV)" --venv-args="$(VENV_ARGS)" --pip-args="$(PIP_ARGS)" \
	--torch-spec "$(TORCH_SPEC)" --triton-spec "$(TRITON_SPEC)"
SOURCES := python triton_kernels tests bench build_tools examples setup.py
CLANG_FORMAT = $(firstword $(wildcard $(VENV)/bin/clang-format) clang-format)
CPP = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

export MARQUARDT_WERROR ?= 1
# Without a GPU a plain `make test` or `make bench` leaves the CUDA kernels out of the library, minutes of nvcc: their code
# runs emulated, and FULL=1 compiles it.
ifeq ($(EVERYTHING)$(wildcard /dev/nvidia* /dev/dxg),)
test bench: export MARQUARDT_CUDA ?= 0
endif

.PHONY: help build test lint bench count clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\): .*## /    make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "    FULL=1            test: everything (46 minutes on two cores, else 10); bench: all shapes"
	@echo "    TORCH_SPEC=...    the torch to install (default $(TORCH_PINNED))"
	@echo "    PIP_ARGS=...      for pip, e.g. --extra-index-url with the index of PyTorch's CPU wheels"
	@echo "    VENV_ARGS=...     for venv; --system-site-packages takes the torch that is installed"
	@echo "    PYTHON=...        the interpreter (default python3), CXX=... the compiler, MAX_JOBS=..."
	@echo "    WORKERS=...       test processes side by side (default: one a core, at most 4)"
	@echo "    OPS=, DTYPE=, DEVICE=   which rows make bench measures;   PYTEST_ARGS= more for pytest"

build: ## virtual environment, requirements, native library
	@$(SETUP) --steps 3

test: ## lint and tests (FULL=1: all of them)
	@$(SETUP) --steps 8
	@echo "[4/8] lint"
	@$(MAKE) --no-print-directory lint-only
	@failed=0; \
	echo "[5/8] Triton kernels through the interpreter"; \
	if $(RUN) -c "import triton" 2>/dev/null; \
	then TRITON_INTERPRET=1 $(PARALLEL) -m "$(ALL)" tests/triton || failed=1; \
	$(if $(EVERYTHING),TRITON_INTERPRET=1 $(PARALLEL) -m "$(SHARED_CASES)" $(SHARED_FILES) || failed=1;) \
	else echo "    skipped: triton is not installed"; fi; \
	echo "[6/8] CUDA kernels on the CPU"; \
	$(PARALLEL) -m "emulation$(AND_QUICK)" tests || failed=1; \
	echo "[7/8] what the compilers made of the GPU kernels"; \
	$(if $(EVERYTHING),$(PYTEST),$(PARALLEL)) -m "static$(AND_QUICK)" tests || failed=1; \
	echo "[8/8] tests"; \
	$(PARALLEL) -m "not emulation and not static and not alone$(AND_QUICK)" tests --ignore=tests/triton || failed=1; \
	$(PYTEST) -m "alone$(AND_QUICK)" tests --ignore=tests/triton || failed=1; \
	exit $$failed

lint: ## ruff, clang-format, mypy
	@$(SETUP) --steps 4
	@echo "[4/4] lint"
	@$(MAKE) --no-print-directory lint-only

.PHONY: lint-only
lint-only:
	$(RUN) -m ruff check $(wildcard $(SOURCES))
	$(RUN) -m ruff format --check $(wildcard $(SOURCES))
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)
	$(RUN) -m mypy

bench: ## microbenchmarks on this machine (FULL=1: all of them)
	@$(SETUP) --steps 4
	@echo "[4/4] benchmarks"
	@$(RUN) -m bench $(if $(EVERYTHING),--full) $(if $(OPS),--ops $(OPS)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(DEVICE),--device $(DEVICE))

count: ## number of tests by kind
	@$(SETUP) --steps 4
	@echo "[4/4] tests by kind"
	@$(RUN) tests/count_kinds.py

clean: ## removes builds and caches, keeps the virtual environment
	rm -rf build dist python/*.egg-info python/marquardt/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -f "$(VENV)/stamp-package"
