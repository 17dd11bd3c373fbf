# make setup       the environment in .venv
# make quickstart  a real study on the embedded default: offline, CPU, about ten minutes; again: carries on
# make test        format, lint, types, layers and tests
# make parity      merges compared with mergekit's, which gets an environment of its own in .oracle
# A GPU user sets TORCH_BUILD, e.g. make setup TORCH_BUILD=cu130

PYTHON ?= python3
TORCH_BUILD ?= cpu
OUT ?= quickstart-study
VENV := .venv
BIN := $(VENV)/bin
ORACLE := $(CURDIR)/.oracle
READY := $(VENV)/.ready-$(TORCH_BUILD)
ifeq ($(shell uname -s),Darwin)
TORCH := torch==2.13.0
else
TORCH := torch==2.13.0+$(TORCH_BUILD) --extra-index-url https://download.pytorch.org/whl/$(TORCH_BUILD)
endif

.PHONY: setup quickstart test parity clean

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
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

parity: setup $(ORACLE)/.ready
	MIXMERGE_ORACLE=$(ORACLE)/bin/mergekit-yaml $(BIN)/python -m pytest tests/parity

$(ORACLE)/.ready: tests/parity/constraints.txt
	$(ORACLE)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --retries 1 $(TORCH)
	$(ORACLE)/bin/python -m pip install --quiet --constraint $< mergekit==0.1.5
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) build dist $(OUT)
