# Two commands set everything up on a fresh machine: `make demo` and `make test`. Nothing is written outside this folder.
PYTHON ?= python3
PIP_ARGS ?=
# The cache of pip lies in the home directory; a clone must leave no trace there.
PIP := .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Two files of tests at a time, in the order of collection: whole runs last.
PYTEST := .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# matplotlib keeps a list of the machine's fonts, by default in the home directory too.
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

.PHONY: demo quick test test-all lint docs dist clean

demo: .venv/.demo
	.venv/bin/mpiexec -n 5 .venv/bin/privfl train

# A developer's loop, under a minute: every folder of tests but those that train or start ranks (runs/
# and api/), without what is marked slow or long.
quick: .venv/.test
	$(PYTEST) -m "not long and not slow" --ignore=tests/runs --ignore=tests/api $(PYTEST_ARGS)

test: .venv/.test lint docs
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-all: .venv/.test lint docs
	$(PYTEST) $(PYTEST_ARGS)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/mypy

# A fresh environment every time (-E): a page that was built before would keep its warnings to itself.
docs: .venv/.test
	.venv/bin/python -m sphinx -E -W --keep-going -q -c docs -d build/doctrees . build/docs
	cp build/docs/README.html build/docs/index.html
	@echo "the documentation is in build/docs/index.html"

# Wheel and source distribution, with the setuptools of .venv and so without a network.
dist: .venv/.test
	rm -rf dist
	.venv/bin/python -m build --no-isolation

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "privfl needs Python 3.11 or later: make demo PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[mpich,examples]'
	@touch $@

.venv/.test: .venv/.demo
	$(PIP) -e '.[mpich,test,dev,docs]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
