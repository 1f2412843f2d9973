# make distill   train, distil, quantise and prove a small translation model (configs/quickstart.yaml)
# make test      the test suite            make lint     formatter, linter, type checker
# make .venv     only the environment      make format   rewrite the code in the house's format
#
# Needs Python 3.11 with venv and pip; another interpreter: make PYTHON=/path/to/python3.11 distill

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: distill test lint format clean .venv
.DEFAULT_GOAL := distill

.venv: $(STAMP)

# The stamp is touched last: an installation that was cut short is done again. Python compiles what it imports.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not a working Python 3.11: install Python 3.11 or name one with make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3.11-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --quiet --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --quiet --no-compile --no-deps --no-build-isolation -e .
	@touch $(STAMP)

distill: $(STAMP)
	$(BIN)/cvm-translator run configs/quickstart.yaml

# A process a core, up to 4: each holds PyTorch. A file's tests stay together, for the models that they share.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Never touches distillation_output: a run may have taken days.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find cvm_translator tests -name __pycache__ -type d -prune -exec rm -rf {} +
