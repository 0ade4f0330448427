# Needs Python 3.10 to 3.12, a C++17 compiler and make; everything else is installed into .venv.
# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
TFMOT_VENV := .venv-tfmot
ENGINES_VENV := .venv-engines
DEEPSPARSE_VENV := .venv-deepsparse
BIN := $(VENV)/bin

# Which TensorFlow .venv gets. Once made, .venv keeps its own until another is asked for.
TENSORFLOW ?= $(or $(shell cat $(VENV)/.requirement 2>/dev/null),tensorflow-cpu>=2.19$(comma)<2.22)
comma := ,

# With a compiler at hand a failure to build the op is an error; without one the pure-Python package is installed.
ifneq ($(shell command -v "$${CXX:-c++}" || command -v g++ || command -v clang++),)
export KERAS_SPARSE_BUILD ?= require
endif

# The last that DeepSparse runs on.
DEEPSPARSE_PYTHON ?= python3.11

# Seconds of `make fuzz`, and its compiler: the newest clang there is.
FUZZ_SECONDS ?= 60
CLANG ?= $(or $(shell command -v clang++ || ls -v /usr/bin/clang++-[0-9]* 2>/dev/null | tail -n 1),clang++)

PIP_INSTALL = -m pip install -qq --disable-pip-version-check --no-input
PYTEST = $(BIN)/python -m pytest
OP_SOURCES := CMakeLists.txt $(shell find custom_ops -type f)
PACKAGING := setup.cfg setup.py pyproject.toml $(wildcard _build_backend/*.py)
CXX_FILES = $(shell find custom_ops -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart test test-slow lint format bazel sanitize fuzz tfmot-parity bench-engines wheel sdist clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.11 and TENSORFLOW='tensorflow-cpu==2.19.*' choose what .venv is made with."

env: $(VENV)/.package ## make .venv, with the package installed for development

quickstart: env ## run examples/quickstart.py
	$(BIN)/python examples/quickstart.py

# A file stays in one process: what it compiles and trains is used by several of its tests.
test: env ## run the tests, the slow ones left out, in up to four processes
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile

test-slow: env ## run the slow tests
	$(PYTEST) -m slow

lint: env ## check style, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: env ## put every source file into the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bazel: env ## build the op and run the C++ tests with Bazel, offline
	PYTHON=$(BIN)/python bazel/run.sh

# $(call build_native,folder,options): the compute routines and their tests alone, without TensorFlow.
define build_native
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(1) -G Ninja -DKERAS_SPARSE_BUILD_OP=OFF $(2)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(1)
endef

sanitize: env ## run the C++ tests under the address, undefined-behaviour and thread sanitizers (needs GoogleTest)
	$(call build_native,build/sanitize,-DKERAS_SPARSE_BUILD_TESTS=ON -DKERAS_SPARSE_SANITIZE=address$(comma)undefined)
	build/sanitize/conv2d_test
	build/sanitize/conv2d_fuzz
	$(call build_native,build/tsan,-DKERAS_SPARSE_BUILD_TESTS=ON -DKERAS_SPARSE_SANITIZE=thread)
	build/tsan/conv2d_test --gtest_filter='Threads.*'

fuzz: env ## feed random shapes and tables to the routines for FUZZ_SECONDS (needs clang with libFuzzer)
	@command -v '$(CLANG)' >/dev/null || { echo "make fuzz needs clang and its libFuzzer, and there is no $(CLANG)." \
	  "On Debian or Ubuntu: apt-get install clang libclang-rt-14-dev; or make CLANG=/path/to/clang++ fuzz." >&2; exit 1; }
	$(call build_native,build/fuzz,-DKERAS_SPARSE_BUILD_FUZZ=ON -DCMAKE_CXX_COMPILER=$(CLANG))
	mkdir -p build/fuzz/corpus
	build/fuzz/conv2d_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=256 -artifact_prefix=build/fuzz/ \
	  -print_final_stats=1 build/fuzz/corpus

tfmot-parity: $(TFMOT_VENV)/.package ## compare with tensorflow-model-optimization, in .venv-tfmot
	$(TFMOT_VENV)/bin/python -m pytest -m tfmot tests/tfmot_parity

bench-engines: $(ENGINES_VENV)/.package $(DEEPSPARSE_VENV)/.package ## install other engines for benchmarks/networks.py

wheel: env ## build dist/*.whl for the TensorFlow of .venv
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

sdist: env ## build dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

clean: ## remove what the other targets made
	rm -rf $(VENV) $(TFMOT_VENV) $(ENGINES_VENV) $(DEEPSPARSE_VENV) bazel/local bazel-out build dist keras_sparse.egg-info quickstart_results \
	  .pytest_cache .ruff_cache
	rm -f keras_sparse/ops/_keras_sparse_ops.so keras_sparse/ops/_build_info.json

# $(call make_venv,folder)
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "keras_sparse needs Python 3.10, 3.11 or 3.12, and '$(PYTHON)' is none: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(1)/bin/python && $(1)/bin/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(1) || $(PYTHON) -m virtualenv --clear $(1) || { rm -rf $(1); \
	  echo "'$(PYTHON) -m venv' cannot make an environment here. On Debian or Ubuntu: apt-get install python3-venv;" >&2; \
	  echo "elsewhere: $(PYTHON) -m pip install virtualenv. Then run make again." >&2; exit 1; }
endef

# Rewritten only when another TensorFlow is asked for.
$(VENV)/.requirement: FORCE
	$(call make_venv,$(VENV))
	@echo '$(TENSORFLOW)' | cmp -s - $@ || echo '$(TENSORFLOW)' > $@

$(VENV)/.tensorflow: $(VENV)/.requirement
	$(BIN)/python $(PIP_INSTALL) '$(TENSORFLOW)' 'setuptools>=70.1' 'cmake>=3.18' ninja
	@touch $@

$(VENV)/.package: $(VENV)/.tensorflow $(PACKAGING) $(OP_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# An environment of its own, since TFMOT keeps absl-py below 2. TFMOT and tf-keras come without their
# dependencies, or tf-keras would pull `tensorflow` over `tensorflow-cpu`, and this package without
# building its op: the one built for .venv serves the same TensorFlow.
$(TFMOT_VENV)/.package: $(PACKAGING)
	$(call make_venv,$(TFMOT_VENV))
	$(TFMOT_VENV)/bin/python $(PIP_INSTALL) '$(TENSORFLOW)' 'setuptools>=70.1' pytest
	KERAS_SPARSE_BUILD=skip $(TFMOT_VENV)/bin/python $(PIP_INSTALL) --no-build-isolation --editable '.[tfmot]'
	$(TFMOT_VENV)/bin/python $(PIP_INSTALL) --no-deps tensorflow-model-optimization==0.8.1 "tf-keras==$$( \
	  PYTHONPATH=_build_backend $(TFMOT_VENV)/bin/python -c \
	  'import ks_tensorflow as t; print(t.of_target_environment().requirement.partition("==")[2])')"
	@touch $@

$(ENGINES_VENV)/.package: benchmarks/requirements-engines.txt
	$(call make_venv,$(ENGINES_VENV))
	$(ENGINES_VENV)/bin/python $(PIP_INSTALL) -r $<
	@touch $@

# Without Python 3.11 the benchmark goes on without DeepSparse.
$(DEEPSPARSE_VENV)/.package: benchmarks/requirements-deepsparse.txt
	@command -v '$(DEEPSPARSE_PYTHON)' >/dev/null || echo "DeepSparse needs Python 3.8 to 3.11, and there is no" \
	  "$(DEEPSPARSE_PYTHON): it is left out. Elsewhere: make DEEPSPARSE_PYTHON=/path/to/python3.11 bench-engines" >&2
	@! command -v '$(DEEPSPARSE_PYTHON)' >/dev/null || { $(DEEPSPARSE_PYTHON) -m venv --clear $(DEEPSPARSE_VENV) \
	  && $(DEEPSPARSE_VENV)/bin/python $(PIP_INSTALL) -r $< && touch $@; }
