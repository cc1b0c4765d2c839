# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Modules are compiled when they are first imported, which is a few of them: --no-compile saves a minute.
.PHONY: demo test lint types unit environments native sanitize arm64 clean

demo: $(VENV)/.export
	$(BIN)/xexport rwkv --target cpu-int8 --out rwkv-cpu-int8 --force
	@echo
	@echo "The report: $(CURDIR)/rwkv-cpu-int8/report.html"
	@echo "Try it:     $(BIN)/xexport run rwkv-cpu-int8 --prompt 'Call me '"

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# One process a core, each with one thread: tests are many and small. WORKERS=0 runs them in one.
WORKERS ?= auto
PYTEST_ARGS ?= -n $(WORKERS) --maxprocesses 8 --dist worksteal
unit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip

$(VENV)/.export: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[export]'
	@touch $@

$(VENV)/.test: $(VENV)/.export tests/oracles.txt
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[export,test]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement tests/oracles.txt
	@touch $@

# Isolated environments for the runtimes whose packages conflict or are heavy; their tests skip without them.
ENVIRONMENTS ?= web webgpu
environments: $(VENV)/.test
	$(BIN)/python -m xexport.runtimes.environments install $(ENVIRONMENTS)

# The kernel library into ops/, for a checkout that is used without being installed.
native:
	cmake -S . -B build/native
	cmake --build build/native
	cmake --install build/native --prefix .

# The kernels without ONNX Runtime: under sanitizers, and on an emulated ARM64 (says what it lacks).
sanitize: $(VENV)/.test
	tests/native/check.sh sanitize $(BIN)/python

arm64: $(VENV)/.test
	tests/native/check.sh arm64 $(BIN)/python

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
