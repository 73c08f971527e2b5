# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first. `make test-all`
# adds the tests marked `slow`: further variants of what others prove, as other GPUs' PTX.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Python compiles what is imported; pip would compile all of transformers and SGLang, for a minute
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

# Tests start many processes: each would compile all of torch anew where the environment keeps Python from writing that
# down, for seconds each (torch and its dynamo: 11 s of 15)
export PYTHONDONTWRITEBYTECODE :=

# What the site has: pages, and the files that they link to
PAGES := *.md LICENSE docs comfyui/README.md comfyui/LICENSE comfyui/graph.svg benchmarks/*.json benchmarks/results

.PHONY: demo test test-all test-gpu lint readme docs clean

demo: $(READY)
	$(VENV)/bin/bitfuse demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m 'not slow'

test-all: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal --durations=25

test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -m gpu

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

readme: $(READY)
	$(VENV)/bin/python benchmarks/roundings.py
	$(VENV)/bin/python benchmarks/tables.py
	$(VENV)/bin/python benchmarks/page.py

# The variable keeps the theme from saying at every build that it will be succeeded
docs: $(READY)
	rm -rf out/pages && mkdir -p out/pages
	tar -cf - $(PAGES) | tar -xf - -C out/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# torch goes in first and pinned: asked for by another package, it would be the newest build, gigabytes of CUDA
# libraries included. Of ltx-core and SGLang only the tests make use, of their transformers alone, so nothing else that
# they need is installed. SGLang's versions are for Python 3.11; where they can't be had its tests are skipped, and say so.
# So are ComfyUI's, of which two releases are unpacked beside the packages.
$(READY): pyproject.toml constraints.txt tests/sglang.txt tests/comfyui.txt tests/comfyui.py
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) -c constraints.txt --no-deps ltx-core
	-$(INSTALL) --no-deps -r tests/sglang.txt
	-$(INSTALL) --no-deps -r tests/comfyui.txt
	@# Python compiles each module at its first import, 25 s of the processor's time for those of the tests. Here two
	@# processes share it; in the tests each worker would do it all
	-$(VENV)/bin/python tests/comfyui.py > $(VENV)/comfyui.log 2>&1 & \
	$(VENV)/bin/python tests/sglang_host.py -m bitfuse.tools.prove.ptx --help > $(VENV)/first.log 2>&1 & \
	$(VENV)/bin/python -c "import torch._dynamo, torch._inductor.utils, diffusers.pipelines.ltx2, peft, ltx_core" \
		>> $(VENV)/first.log 2>&1; wait
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .hypothesis .ruff_cache .mypy_cache
