# make train   set up .venv, build, train on what is there, evaluate, write a report
# make test    set up .venv, build, run the tests
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: train test lint bench aot cuda-check cuda-build clean

train: $(STAMP)
	$(BIN)/qwen-fused train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is built for the torch that is there
$(STAMP): setup.py pyproject.toml $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -c "from qwen_fused import backends; print('extension:', backends.describe()['extension'])"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror csrc/*

bench: $(STAMP)
	$(BIN)/python -m pytest bench/bench_*.py -o python_files='bench_*.py' $(ARGS)

# CUDA kernels for each GPU generation: warnings are errors, registers and spills are told; no torch, no GPU needed
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))

cuda-check:
	@if [ -z "$(NVCC)" ]; then echo "cuda-check: skipped, there is no nvcc (set CUDA_HOME)"; exit 0; fi; \
	for source in csrc/*.cu; do for arch in 80 90 100; do \
		echo "$$source sm_$$arch"; \
		$(NVCC) -std=c++17 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v,-warn-spills \
			-gencode arch=compute_$$arch,code=sm_$$arch -c $$source -o /dev/null || exit 1; \
	done; done

# Triton kernels compiled for each GPU generation, no GPU needed
aot: $(STAMP)
	for script in $(wildcard bench/aot_*.py tests/test_aot.py); do $(BIN)/python -m pytest -q $$script || exit 1; done

clean:
	rm -rf build qwen_fused/_C*.so $(VENV) *.egg-info
