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

.PHONY: help setup run test figures student lab lint book book-check canary licences clean
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
	@echo "make canary  the trainers' tests with the newest TRL, in build/canary, and what breaks"
	@echo "make licences  the licence of every pinned package and, where pip-audit is installed, its report"
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

# One process for the notebooks, one for the tests, each with one thread: more would wait for each other on two cores.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

# a run of some notebooks, as of --only, has some of the figures
figures: $(STAMP)
	@test -e runs/latest || $(BIN)/python -m cdpo_utils.run
	@for path in notebooks/[0-9][0-9]_*.ipynb; do test -e "runs/latest/$${path##*/}" \
		|| { echo "runs/latest: no executed $${path##*/}; make run executes the whole series" >&2; exit 1; }; done
	@rm -rf build/figures && mkdir -p build && cp -R runs/latest/records/figures build/figures && echo build/figures

student: $(STAMP)
	$(BIN)/python -m cdpo_utils.student $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate notebooks

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

# pip says that this TRL is not what pyproject.toml asks for: that is the point
canary: CANARY := build/canary/bin/python
canary:
	$(PYTHON) -m venv --clear build/canary
	$(CANARY) -m pip --disable-pip-version-check install -c constraints.txt $(TORCH) torch
	$(CANARY) -m pip --disable-pip-version-check install -c constraints.txt -e .
	$(CANARY) -m pip --disable-pip-version-check install --upgrade trl
	@HF_HUB_OFFLINE=1 $(CANARY) -m pytest tests/test_trainers.py --tb=short -rfE $(ARGS); status=$$?; \
		echo "TRL $$($(CANARY) -c 'from importlib.metadata import version; print(version("trl"))'):" \
			"$$(test $$status = 0 && echo nothing breaks || echo what breaks is named above)"; exit $$status

licences: $(STAMP)
	@$(BIN)/python -m cdpo_utils.licences
	@if command -v pip-audit > /dev/null; then pip-audit -r constraints.txt --no-deps --disable-pip; \
		else echo "pip-audit is not installed: no report on known vulnerabilities"; fi

clean:
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find cdpo_utils tests notebooks data \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
