# Two commands set everything up on a fresh machine: `make demo` and `make test`. Nothing is written outside this folder.
PYTHON ?= python3
PIP_ARGS ?=
# The cache of pip lies in the home directory; a clone must leave no trace there.
PIP := .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
PYTEST := .venv/bin/python -m pytest
# matplotlib keeps a list of the machine's fonts, by default in the home directory too.
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

.PHONY: demo test test-all lint clean

demo: .venv/.demo
	.venv/bin/mpiexec -n 5 .venv/bin/privfl train

test: .venv/.test lint
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-all: .venv/.test lint
	$(PYTEST) $(PYTEST_ARGS)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "privfl needs Python 3.11 or later: make demo PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[mpich,examples]'
	@touch $@

.venv/.test: .venv/.demo
	$(PIP) -e '.[mpich,test,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
