# `make` alone lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PIP_FLAGS ?=
DATA ?= shakespeare
NB ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

help: ## this list
	@echo "llm_course: build a large language model from scratch"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo; echo "  Options: DATA=tiny|shakespeare|path/to/file.txt   ARGS='--train.max_steps 200'   NB=nbs/05_attention.ipynb"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 run")'
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's module venv is needed; on Debian: apt install python3-venv"; exit 1; }

# One stamp for each set of packages; it is remade when a requirement or a pinned version changes.
.venv/run.stamp: settings.ini setup.py constraints.txt | .venv/bin/python
	@echo "Installing what training needs (once; PyTorch is a large download) ..."
	@$(INSTALL) -e '.[train]' && touch $@

.venv/dev.stamp: settings.ini setup.py constraints.txt | .venv/bin/python
	@echo "Installing what the course, its tests and its site need (once) ..."
	@$(INSTALL) -e '.[dev]' && touch $@ .venv/run.stamp

run: .venv/run.stamp ## fetch a text, train a tokenizer, pretrain a GPT, write (DATA=tiny works offline)
	@$(BIN)/llm-course run --data "$(DATA)" $(ARGS)

test: .venv/dev.stamp ## everything that CI checks
	@bash tools/test.sh

lab: .venv/dev.stamp ## open the course in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

docs: .venv/dev.stamp ## build the site into _docs/ (Quarto when present, otherwise the fallback renderer)
	@$(BIN)/python tools/docs.py build

prepare: .venv/dev.stamp ## export the package, clean the notebooks, write README.md: before each commit
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tools/docs.py readme

execute: .venv/dev.stamp ## run a notebook from top to bottom in a fresh kernel and keep its outputs: make execute NB=nbs/00_core.ipynb
	@test -f "$(NB)" || { echo "name a notebook: make execute NB=nbs/00_core.ipynb"; exit 2; }
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 "$(NB)"
	@$(BIN)/nbdev_clean --fname "$(NB)"

bench: .venv/dev.stamp ## the measurements of benchmarks/, side by side with other libraries
	@for f in benchmarks/bench_*.py; do n=$${f#benchmarks/bench_}; echo "== $$f"; $(BIN)/python $$f --out benchmarks/$${n%.py}.md || exit 1; done

.PHONY: help run test lab docs prepare execute bench
