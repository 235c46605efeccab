# make run        side by side: stock vLLM and tidepool, on two tiny models; then a trained model's answers
# make test       all tests, two files at a time; those of two ranks by themselves, since ranks spin while they wait
# make test-0.33  what needs no kernels, on the Python files of vLLM 0.33, which are downloaded (some 330 MB, once)
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

# There is no vLLM 0.33 for the CPU. These start no engine with kernels.
TESTS_033 := tests/vllm_plugin tests/speculative/test_lookups.py tests/parallel/test_planning.py \
  tests/test_plan_stock_vllm.py tests/test_models_vllm.py tests/test_replay_vllm.py

.PHONY: run test test-0.33 test-core lint wheel clean

run: $(VENV)/.cpu
	$(BIN)/tidepool compare $(ARGS)
	$(BIN)/tidepool verify --quick

test: $(VENV)/.dev
ifeq ($(ARGS),)
	-$(BIN)/python -m tidepool.running.unpacked 0.33.0
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/parallel
	$(BIN)/pytest tests/parallel
	$(MAKE) test-0.33
else
	$(BIN)/pytest $(ARGS)
endif

test-0.33: $(VENV)/.dev
	if folder=$$($(BIN)/python -m tidepool.running.unpacked 0.33.0); then \
	  PYTHONPATH=$$folder:$$PYTHONPATH $(BIN)/pytest -n 2 --dist loadfile --vllm 0.33.0 $(or $(ARGS),$(TESTS_033)); \
	else echo 'Not run: the tests on vLLM 0.33.0, which is not here and could not be downloaded.'; test -z "$$CI"; fi

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
