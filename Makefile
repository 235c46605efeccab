# make run        side by side: stock vLLM and tidepool, on two tiny models; then a trained model's answers
# make test       all tests, two files at a time; those of two ranks by themselves, since ranks spin while they wait
# make test-core  the core's tests alone: without vLLM, in under a minute
# make lint       style and types
# make wheel      a wheel in dist/, to install elsewhere
# Needs Python 3.11 and pip; everything is installed in .venv. PIP_ARGS go to pip install.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile $(PIP_ARGS)

# Where it is set, every process of the tests compiles vLLM anew, 20 seconds each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-core lint wheel clean

run: $(VENV)/.cpu
	$(BIN)/tidepool compare $(ARGS)
	$(BIN)/tidepool verify --quick

test: $(VENV)/.dev
ifeq ($(ARGS),)
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/parallel
	$(BIN)/pytest tests/parallel
else
	$(BIN)/pytest $(ARGS)
endif

test-core: $(VENV)/.test
	$(BIN)/pytest tests/cache $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.dev
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist $(PIP_ARGS) .

clean:
	rm -rf $(VENV) .cache build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[cpu]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[test]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[cpu,dev]'
	touch $@ $(VENV)/.cpu $(VENV)/.test
