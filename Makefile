# `make demo` runs the main job from nothing, `make test` the tests, `make check` everything CI runs.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint check env clean

demo: env
	$(RUN) -m jobs.demo --out out/demo $(DEMO_OPTIONS)

test: env
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

check: lint test

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache
