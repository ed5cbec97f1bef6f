# `make run` and `make test` each need nothing but make and Python 3.11 or newer: they set up .venv first.
#   make run ARGS="--only 02"           what follows ARGS= goes to the runner, or to pytest
#   make setup TORCH="--index-url ..."  pip options for torch alone, such as the index of its CPU wheels
#   make run PYTHON=python3.12          another interpreter to make .venv from

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup run test figures student lab lint book book-check clean
.DEFAULT_GOAL := help

help:
	@echo "make run    execute the notebooks, write runs/<time>/ with a table and an HTML report"
	@echo "make test   unit tests, house style, and every notebook, without network"
	@echo "make figures  every figure of the last run as PNG, its data as CSV, in build/figures"
	@echo "make student  copies of the notebooks without solutions, in build/student"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make lint   ruff over modules and notebooks"
	@echo "make book   the notebooks of the newest run as a site with the explorer; needs Node.js and its npm"
	@echo "make book-check  open every page of the book in Chromium and name its faults"
	@echo "make setup  create or update .venv (the others do it when needed)"
	@echo "make clean  remove build/ and caches; runs/ and .venv stay"
	@echo "make help   this list"

setup: $(STAMP)

# torch comes first, so that a build chosen with TORCH= (or already there) satisfies the rest
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: try make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH) torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

run: $(STAMP)
	$(BIN)/python -m cdpo_utils.run $(ARGS)

test: export HF_HUB_OFFLINE = 1
test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

figures: $(STAMP)
	@test -e runs/latest || $(BIN)/python -m cdpo_utils.run
	@rm -rf build/figures && mkdir -p build && cp -R runs/latest/records/figures build/figures && echo build/figures

student: $(STAMP)
	$(BIN)/python -m cdpo_utils.student $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the book's own needs stay out of `make setup`
$(VENV)/.book: $(STAMP)
	$(PIP) install -c constraints.txt -e ".[book]"
	@touch $@

book/node_modules: book/package.json
	@command -v npm > /dev/null || { echo "make book needs Node.js: npm fetches MathJax, which draws the formulas" >&2; exit 1; }
	npm install --prefix book --no-package-lock --no-audit --no-fund
	@touch $@

book: $(VENV)/.book book/node_modules
	$(BIN)/python -m cdpo_utils.book $(ARGS)

book-check: book/node_modules
	node book/check.mjs build/book

clean:
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find cdpo_utils tests notebooks data \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
