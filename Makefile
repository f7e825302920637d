# make demo    train the chest X-ray bundle with and without privacy (DATA=<folder or .npz> for real images)
# make test    run the tests
# make check   lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
DATA ?=
EPSILON ?= 3
OUTPUT ?= demo_output
TESTS ?= tests

.PHONY: demo test check install clean

demo: install
	$(BIN)/python -m monai_privacy demo --epsilon $(EPSILON) --output $(OUTPUT) $(if $(DATA),--data "$(DATA)")

test: install
	$(BIN)/python -m pytest -n 2 $(TESTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first and pinned: another package's open range would pull several gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "Python %d.%d found, but 3.11 to 3.13 is needed: make PYTHON=python3.12" % v)'
	@echo "installing into $(VENV), a few minutes once ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUTPUT)
