# The project's commands, in one environment that this file creates (.venv). `make` lists them.

PYTHON ?= python3
# The torch that pip installs: a version, a wheel, or "torch==2.13.0 --index-url ..." for another build.
TORCH ?= torch==2.13.0
# Arguments for the command: make demo ARGS="--seed 1", make test ARGS="-k models -x".
ARGS ?=

BIN := .venv/bin
# pip compiles no Python modules (--no-compile): most of torch's are never imported. Python compiles a module when it is
# first imported. Keep the result in .venv, whatever the caller's environment says: hundreds of test processes import
# torch, and compiling it takes three seconds in each.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/pycache
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# `pip install -e` installs this folder, so a change in Python needs no reinstallation; a change in these files does.
SOURCES := setup.py pyproject.toml $(shell find build_support csrc -name __pycache__ -prune -o -type f \
	\( -name '*.py' -o -name '*.txt' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*' \) -print)
CPP = $(shell find csrc tools benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The extras of pyproject.toml that a target needs.
EXTRAS_demo := demo
EXTRAS_test := test,demo
EXTRAS_bench := bench
EXTRAS_lint := lint,plot
EXTRAS_docs := docs,plot,triton
EXTRAS_wheel := wheel
# nvcc takes minutes to compile for all cards. Without a card, only the tests build the CUDA kernels, to read nvcc's
# output: for one card, or for those in TORCH_CUDA_ARCH_LIST, or for all if that is empty.
NO_CARD := $(if $(shell command -v nvidia-smi),,1)
NO_CUDA := $(if $(NO_CARD),COTUNING_KERNELS_CUDA=0)
CUDA_test := $(if $(NO_CARD),TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-9.0+PTX}")
CUDA_demo := $(NO_CUDA)
CUDA_bench := $(NO_CUDA)
CUDA_lint := COTUNING_KERNELS_CUDA=0
CUDA_docs := COTUNING_KERNELS_CUDA=0
CUDA_wheel := COTUNING_KERNELS_PURE_PYTHON=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test torture gpu bench lint docs wheel clean distclean

help: ## list the targets
	@echo "make TARGET [ARGS=\"...\"] [PYTHON=python3.12] [TORCH=\"torch==2.13.0\"]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

demo: .venv/installed-demo ## fine-tune real weights on real images, plainly and with Co-Tuning (about three minutes)
	@$(BIN)/python examples/demo.py $(ARGS)

# Each worker gets neighbouring tests, because they share slow fixtures.
test: .venv/installed-test ## run the whole test suite, a worker a core
	@$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

torture: .venv/installed-test ## kill, starve and feed with hostile files what saves and counts (up to twenty minutes)
	@$(BIN)/python -m tools.torture $(ARGS)

# Not in .venv: a GPU machine has its own torch, and perhaps no network. This leaves its Python unchanged.
gpu: ## on a GPU machine: build for its card, then checks, tests, times and counters in eight minutes, into gpu_report
	@$(PYTHON) -m tools.gpu $(ARGS)

bench: .venv/installed-bench ## run the benchmarks, print a table of ratios to today's formulations, write a page with pictures
	@MALLOC_MMAP_MAX_=0 $(BIN)/pytest benchmarks --benchmark-only $(ARGS)
	@$(BIN)/python -m benchmarks ratios
	@$(BIN)/python -m benchmarks limits
	@$(BIN)/python -m benchmarks page --output benchmark_page

lint: .venv/installed-lint ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

docs: .venv/installed-docs ## build the documentation site into build/docs, with warnings as errors
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

# The wheel is for this Python and for torch 2.10 and newer. It does not contain torch's libraries.
wheel: .venv/installed-wheel ## build a wheel and a source distribution into dist; auditwheel and twine check them
	@rm -rf dist build/wheel build/lib*
	@$(BIN)/python -m build --no-isolation --sdist --outdir dist >build/sdist.log || { cat build/sdist.log; exit 1; }
	@$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel >build/wheel.log || { cat build/wheel.log; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude libc10.so \
		--wheel-dir dist build/wheel/*.whl
	@$(BIN)/python -m twine check --strict dist/*

clean: ## remove what was built, written or cached here; .venv and the downloaded images stay
	rm -rf build dist *.egg-info demo_output benchmark_page gpu_report .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -f cotuning_kernels/*.so .venv/installed-*

distclean: clean ## and those too
	rm -rf .venv .cache

# One stamp per set of extras, renewed when the sources change.
.venv/installed-%: $(SOURCES) | .venv/torch
	@echo "Installing cotuning_kernels with its extras [$(EXTRAS_$*)] into .venv"
	@$(CUDA_$*) $(PIP_INSTALL) --quiet -e ".[$(EXTRAS_$*)]" || { echo "make: the installation failed (pip's words are above):\
	 check the network, then run make again." >&2; exit 1; }
	@touch $@

.venv/torch: | .venv/python
	@echo "Installing $(TORCH) into .venv"
	@$(PIP_INSTALL) $(TORCH) || { echo "make: torch could not be installed (pip's words are above): check the network,\
	 or name another one, for instance make TORCH=torch." >&2; exit 1; }
	@touch $@

.venv/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON): install Python 3.10 or newer (apt-get\
	 install python3 python3-venv), or name yours: make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is\
	 $$($(PYTHON) --version), but Python 3.10 or newer is needed: name one, for instance make PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments:\
	 install its venv module (apt-get install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@touch $@
