# make train   set up .venv, build, train on what is there, evaluate, write a report
# make test    set up .venv, build, run the tests
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# GPU generations that every kernel is compiled for
ARCHES = 80 90 100 120
# tests at a time: most of them keep one core busy
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: train test lint docs bench aot sanitize cuda-check cuda-build clean

# two minutes of training, four for a start, then seconds on each held-out task: under 10 on two cores
train: ARGS ?= --max-minutes 2.2 --start-minutes 4
train: $(STAMP)
	$(BIN)/qwen-fused train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is built for the torch that is there
$(STAMP): setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -c "from qwen_fused import backends; print('extension:', backends.describe()['extension'])"
	@touch $@

# prose wraps at 100; docs/api.md and the figures of docs/performance.md are written in the same form
PROSE = --wrap 100 --number --compact-tables README.md CHANGELOG.md CONTRIBUTING.md docs bench/GPU.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mdformat --check $(PROSE)
	$(BIN)/clang-format --dry-run -Werror $(wildcard tests/helpers/*.c csrc/*.* csrc/*/*.* csrc/*/*/*.*)

# docs/api.md from the docstrings, the table of docs/proof.md from its tests
docs: $(STAMP)
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_proof_table.py

bench: $(STAMP)
	$(BIN)/qwen-fused bench $(ARGS)

# CUDA kernels for each GPU generation: warnings are errors, registers and spills are told; no torch, no GPU needed
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))

cuda-check:
	@if [ -z "$(NVCC)" ]; then echo "cuda-check: skipped, there is no nvcc (set CUDA_HOME)"; exit 0; fi; \
	for source in csrc/*/*.cu; do for arch in $(ARCHES); do \
		echo "$$source sm_$$arch"; \
		$(NVCC) -std=c++17 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v,-warn-spills \
			-gencode arch=compute_$$arch,code=sm_$$arch -c $$source -o /dev/null || exit 1; \
	done; done

# the CPU half of the extension under ASan, UBSan and TSan by its own tests; then planted faults that they must catch
sanitize: $(STAMP)
	$(BIN)/python tests/system/sanitize/run.py

# Triton kernels compiled for each GPU generation, no GPU needed; `make -j2 aot` compiles for two at a time
aot: $(ARCHES:%=aot-%)

aot-%: $(STAMP)
	set -e; for script in $(wildcard bench/aot_*.py); do $(BIN)/python $$script --arch $*; done

# the extension built for a CUDA torch, linked and imported; a second environment of some 6 GB, no GPU needed
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda

cuda-build:
	@[ -n "$(NVCC)" ] || { echo "cuda-build: there is no nvcc (set CUDA_HOME)"; exit 1; }
	[ -x $(CUDA_VENV)/bin/python ] || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q "$(CUDA_TORCH)"
	rm -rf $(CUDA_VENV)/source && mkdir $(CUDA_VENV)/source
	cp -a setup.py pyproject.toml README.md csrc kernels $(CUDA_VENV)/source
	mkdir $(CUDA_VENV)/source/qwen_fused && cp -a $(filter-out %.so,$(wildcard qwen_fused/*)) $(CUDA_VENV)/source/qwen_fused
	cd $(CUDA_VENV)/source && QWEN_FUSED_REQUIRE_EXTENSION=1 ../bin/python -m pip install -v --force-reinstall --no-deps .
	$(CUDA_VENV)/bin/python -m pip install -q $(CUDA_VENV)/source
	cd $(CUDA_VENV) && bin/python -c "from qwen_fused import backends as b; print(b.describe()); \
		assert b.EXTENSION_HAS_CUDA and b.has_kernel('group_grad_clip_', 'cuda'), b.EXTENSION_ERROR"

clean:
	rm -rf build qwen_fused/_C*.so $(VENV) *.egg-info
