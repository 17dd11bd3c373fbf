# make setup       the environment in .venv
# make quickstart  a real study on the embedded default: offline, CPU, about ten minutes; again: carries on
# make test        format, lint, types, layers and tests
# A GPU user sets TORCH_BUILD, e.g. make setup TORCH_BUILD=cu130

PYTHON ?= python3
TORCH_BUILD ?= cpu
OUT ?= quickstart-study
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(TORCH_BUILD)
ifeq ($(shell uname -s),Darwin)
TORCH := torch==2.13.0
else
TORCH := torch==2.13.0+$(TORCH_BUILD) --extra-index-url https://download.pytorch.org/whl/$(TORCH_BUILD)
endif

.PHONY: setup quickstart test clean

setup: $(READY)

# torch goes first and alone: a later package that wants "torch" then finds it and pulls no other build.
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	rm -f $(VENV)/.ready-*
	touch $@

quickstart: setup
	$(BIN)/mixmerge run recipes/quickstart.yaml --out $(OUT)

test: setup
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist $(OUT)
