# Python and make are all that a fresh machine needs: every target below first sees to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: the tiny models of the tests lose more to thread hand-over than they win, and pytest runs
# one process per core.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKERS ?= 2
# A worker that is done takes tests from another, as the slowest take longer than a hundred others.
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test fast newest oldest kernels check format bench bench-gpu clean

help:  ## List the targets
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(STAMP)  ## Train a tiny hybrid on real text, then its responses over frozen contexts
	$(BIN)/frozen-peft demo

test: check  ## Lint, then every test that needs no accelerator
	@echo "== tests"
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu and not benchmark and not long" $(PARALLEL) --durations 60
	@echo "== costs"
	$(TEST_ENV) $(BIN)/python -m pytest -m "benchmark and not long" $(PARALLEL)

fast: $(STAMP)  ## The tests that take seconds
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu and not slow and not benchmark and not long" $(PARALLEL)

newest oldest: %: .venv-%/.installed  ## The same with the newest and oldest releases that the bounds allow
	@.venv-$@/bin/python -c 'from importlib.metadata import version; print("==", *(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")))'
	$(TEST_ENV) .venv-$@/bin/python -m pytest -m "not gpu and not slow and not benchmark and not long" $(PARALLEL)

# Which of them: -m "kernels and not slow" are those of a minute or two.
KERNELS ?= kernels
kernels: .venv-kernels/.installed  ## What only a GPU runs of Triton, in Triton's interpreter
	TRITON_INTERPRET=1 $(TEST_ENV) PYTHONPATH=. .venv-kernels/bin/python -m pytest -m "$(KERNELS)" $(PARALLEL) tests/kernels

check: $(STAMP)  ## Style, spelling, types
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== codespell"
	$(BIN)/codespell
	@echo "== mypy"
	$(BIN)/mypy

format: $(STAMP)  ## Apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## What takes too long for every change: tests, and costs against SFTTrainer, written to docs/benchmarks
	$(TEST_ENV) $(BIN)/python -m pytest -m "long"
	$(BIN)/python -m tests.benchmarks

# What speeds up a GPU is not everywhere to be had; the benchmark runs without it and says so.
bench-gpu: $(STAMP)  ## Models of true shape on one GPU, in under eight minutes, written to docs/benchmarks
	$(BIN)/python -m tests.benchmarks.gpu.install -c constraints.txt || echo "== going on with what is installed"
	$(BIN)/python -m tests.benchmarks.gpu

clean:  ## Remove the environment, caches and outputs
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-kernels build dist outputs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment of its own, since the two ends cannot stand in one. constraints.txt may be older than what they hold.
.venv-%/.installed: pyproject.toml constraints.txt tests/bounds.py
	@echo "== installing into .venv-$*"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python tests/bounds.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --progress-bar off --disable-pip-version-check --upgrade \
	  -c .venv-$*/constraints.txt -e '.[dev]'
	@touch $@

# An environment of its own, as flash-linear-attention breaks models where there is no driver: what .venv has, and beside
# it what a GPU adds.
.venv-kernels/.installed: $(STAMP) tests/kernels/sources.py
	@echo "== installing into .venv-kernels"
	$(PYTHON) -m venv .venv-kernels
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-kernels/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/what_venv_has.pth"
	.venv-kernels/bin/python -m pip install --progress-bar off --disable-pip-version-check --no-deps \
	  'flash-linear-attention>=0.6' 'fla-core>=0.6' einops 'triton>=3.7' wheel
	PYTHONPATH=. .venv-kernels/bin/python -m tests.kernels.sources
	@touch $@

# The stamp is newer than both files exactly while the environment matches them.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "== installing into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
