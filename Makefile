# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test test-gpu lint readme clean

demo: $(READY)
	$(VENV)/bin/bitfuse demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -m gpu

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

readme: $(READY)
	$(VENV)/bin/python benchmarks/tables.py

# torch goes in first and pinned: asked for by another package, it would be the newest build, gigabytes of CUDA
# libraries included. ltx-core is only read by the tests (one file of it), so none of its needs is installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps ltx-core
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .hypothesis .ruff_cache .mypy_cache
