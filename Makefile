# Everything here works on a machine that has only Python 3.10+, make and gcc: each target makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint results clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[train]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/bitswitch run digits
	$(BIN)/bitswitch evaluate runs/digits/supernet.safetensors --assignment runs/digits/frontier.json

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples code
	$(BIN)/ruff format --check src tests benchmarks examples code
	$(BIN)/mypy

# One thread a process and a process a core: small tensors gain nothing from threads, which only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

results: $(VENV)/.dev
	$(BIN)/python -m bitswitch.report README.md results/cifar10 --brief
	$(BIN)/python -m bitswitch.report docs/checks.md results
	$(BIN)/python -m bitswitch.report docs/performance.md results/performance
	MPLBACKEND=agg $(BIN)/python -m bitswitch.report docs/results.md results/cifar10 --figures docs/plots
	$(BIN)/python -m bitswitch.report src/bitswitch/shipped/README.md results/shipped

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
