TORCH := 2.14.1
BIN := .venv/bin
ARGS ?=
SECONDS ?= 60
OUT ?= gpu_check_out
CXX_FILES = $(shell find csrc tests/native tests/emulation -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
SANITIZE := -std=c++20 -O1 -g -Wall -Icsrc -fno-math-errno -fno-trapping-math -Wno-psabi \
            -fsanitize=address,undefined -fno-sanitize-recover=all -pthread

.PHONY: help build test emulate-full lint format demo bench sanitize fuzz gpu-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

.venv/ready: pyproject.toml
	python3 -m venv .venv
	$(BIN)/pip install --quiet torch==$(TORCH) torchvision 'setuptools>=77' ninja  # a torchvision that fits this torch
	@touch $@

.venv/built: .venv/ready setup.py $(shell find csrc -type f)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test,lint]'
	@touch $@

build: .venv/built  ## set up .venv and build the native libraries in place

test: build  ## run the tests (ARGS="-k name" for some)
	$(BIN)/pytest -n 2 $(ARGS)

emulate-full: build  ## run the CUDA kernels in the emulator on many more problems than make test does
	$(BIN)/pytest -n 2 -m "full or not full" tests/emulation $(ARGS)

lint: build  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: build  ## format everything
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

demo: build  ## the main job: speed against torch SDPA, then training on real text
	$(BIN)/python -m reformer_kernels.demo $(ARGS)

bench: build  ## measure against the peers
	$(BIN)/python -m benchmarks.run $(ARGS)

fuzz: build  ## run random shapes, rules and strides against the oracle (SECONDS=60)
	$(BIN)/python -m tests.test_random $(SECONDS)

HARNESS_OBJECTS := $(patsubst %.cpp,build/sanitize/%.o,$(notdir $(wildcard csrc/kernels/cpu/*.cpp)) harness.cpp)
vpath %.cpp csrc/kernels/cpu tests/native

build/sanitize/%.o: %.cpp $(wildcard csrc/kernels/*.h csrc/kernels/cpu/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

build/sanitize/harness: $(HARNESS_OBJECTS)
	$(CXX) $(SANITIZE) $^ -o $@

sanitize:  ## run the CPU kernels under ASan and UBSan (ARGS="cases seed")
	$(MAKE) -j2 build/sanitize/harness
	build/sanitize/harness $(ARGS)

# A GPU machine may have no network, so a python3 that has torch is taken as it is.
HAS_TORCH = import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))
GPU_PYTHON = $(or $(PYTHON),$(shell python3 -c '$(HAS_TORCH)' && echo python3))
gpu-check: $(if $(filter gpu-check,$(MAKECMDGOALS)),$(if $(GPU_PYTHON),,build))  ## measure a GPU machine (OUT=dir, STAGE=name, PYTHON=python)
	"$(or $(GPU_PYTHON),$(BIN)/python)" -m benchmarks.gpu_check --out "$(OUT)" $(if $(STAGE),--stage $(STAGE))

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv/built reformer_kernels/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
