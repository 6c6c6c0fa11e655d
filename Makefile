# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all their own set-up in .venv: they need only Python >= 3.11, make and g++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
TEST_ENV := PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint unit compat hf-quick hf-tests triton triton-aot sanitize packaging bench bench-quick wheel gpu clean

help:
	@echo "make demo    train a soft prompt on real text with the tiny T5 in this repository (about 3 minutes)"
	@echo "make test    everything that CI runs"
	@echo "make bench   benchmarks beside what a user has today"
	@echo "make lint | unit | compat | hf-quick | bench-quick | triton | triton-aot | sanitize | packaging   the parts of make test"
	@echo "make hf-tests  all of transformers' own model tests on patched models (about 3 minutes)"
	@echo "make wheel   build a manylinux wheel into dist/"
	@echo "make gpu     on a machine with an NVIDIA GPU, without network: build, test and benchmark there"

setup: $(VENV)/installed

# torch first, and exactly one build of it: the CPU build where there is no NVIDIA GPU. PyPI's default build for Linux
# is CUDA's, so where no index offers the CPU build, PyTorch's own is asked.
$(VENV)/packages: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("fastprompt needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if nvidia-smi > /dev/null 2>&1; then \
		$(BIN)/pip install -q torch==$(TORCH); \
	else \
		$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/pip install -q torch==$(TORCH)+cpu 2> /dev/null \
		|| $(BIN)/pip install -q torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu; \
	fi
	$(BIN)/python tools/requirements.py > $(VENV)/requirements.txt
	$(BIN)/pip install -q -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(VENV)/installed: $(VENV)/packages setup.py $(NATIVE)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python -m fastprompt.demo

test: lint unit compat hf-quick triton triton-aot sanitize packaging bench-quick
	@echo "all parts of make test passed"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*.cu)
	$(BIN)/python tools/clang_tidy.py
	$(BIN)/mypy

unit: setup
	$(PYTEST) tests --ignore tests/triton --ignore tests/triton_aot --ignore tests/packaging

# What stands on transformers, on other versions than constraints.txt's, which is the newest that is known: on the oldest
# that pyproject.toml allows, and on the last before 5.24 gave arguments other names.
OTHERS := 5.15.0 5.23.0
OTHER := $(CURDIR)/$(VENV)/transformers-
.PRECIOUS: $(OTHER)%/ready

$(OTHER)%/ready: | $(VENV)/packages
	rm -rf $(@D)
	grep -vE '^(transformers|tokenizers|huggingface_hub)=' constraints.txt > $(VENV)/other-constraints.txt
	$(BIN)/pip install -q --target $(@D) -c $(VENV)/other-constraints.txt transformers==$*
	touch $@

compat-%: setup $(OTHER)%/ready
	PYTHONPATH=$(OTHER)$* $(BIN)/python -c 'import transformers; assert transformers.__version__ == "$*"'
	PYTHONPATH=$(OTHER)$* $(PYTEST) tests/models tests/prompts tests/training tests/hf tests/demo tests/test_cli.py

compat: $(OTHERS:%=compat-%)

# transformers' own tests of models, which are in its sdist, on stock T5 and on patched T5.
HF_TESTS := $(VENV)/transformers-tests-$(TRANSFORMERS)
HF_PYTEST := OMP_NUM_THREADS=1 $(PYTEST) -rf -o pythonpath=tests/hf tests/hf/transformers_tests.py

$(HF_TESTS)/ready: | $(VENV)/packages
	rm -rf $(HF_TESTS)
	$(BIN)/pip download -q --no-binary :all: --no-deps --no-build-isolation -d $(HF_TESTS) transformers==$(TRANSFORMERS)
	tar -xzf $(HF_TESTS)/transformers-$(TRANSFORMERS).tar.gz -C $(HF_TESTS) --strip-components 1 transformers-$(TRANSFORMERS)/tests
	$(BIN)/pip install -q --no-deps --target $(HF_TESTS)/packages parameterized==0.9.0
	touch $@

hf-tests: setup $(HF_TESTS)/ready
	$(HF_PYTEST)

hf-quick: setup $(HF_TESTS)/ready
	$(HF_PYTEST) -k "v1_1 or t5-encoder"

# Triton's interpreter and its compiler exclude each other in one process.
triton: setup
	TRITON_INTERPRET=1 $(PYTEST) tests/triton tests/ops --backends triton

triton-aot: setup
	$(PYTEST) tests/triton_aot

# Native CPU code and the emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: setup
	FASTPROMPT_SANITIZE=address,undefined FASTPROMPT_CUDA=0 $(BIN)/python setup.py -q build --build-base build/asan-objects --build-lib build/asan
	$(BIN)/python tools/sanitize.py build/asan

packaging: setup
	$(PYTEST) tests/packaging

bench: setup
	$(TEST_ENV) $(BIN)/python -m pytest -s -q -p no:cacheprovider benchmarks/bench_*.py --benchmark-group-by=group

bench-quick: setup
	$(PYTEST) benchmarks/bench_*.py --quick

# For other machines with this Python and a C library as new as the wheel's name says.
wheel: setup
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PYTHON=$(BIN)/python bash tools/manylinux.sh build/wheel/*.whl dist

# Uses the machine's own Python, torch and compiler; writes only under build/gpu and $(OUT).
OUT ?= benchmarks/results/gpu
gpu:
	OUT=$(OUT) PYTHON=$(PYTHON) bash tools/gpu.sh

clean:
	rm -rf build dist fastprompt.egg-info fastprompt/_C*.so
