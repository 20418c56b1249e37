# make report   the report site, with notebooks executed here      make test   the tests, then the notebooks
# make check    style, types and the quick tests, in a minute      make lab    JupyterLab
# GNU make is needed (on the BSDs it is called gmake; macOS and Linux have it as make).
# Everything is installed into .venv beside this file, once. Two variables can be given on the command line:
#   PYTHON=/path/to/python3.12                            the Python (3.11 or newer) that .venv is made from
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu      PyTorch without CUDA, a far smaller download on Linux

SHELL := /bin/sh
PY := .venv/bin/python
READY := .venv/.installed
STYLED := m2helpers tests tools notebooks solutions binder/colab.ipynb conftest.py setup.py docs/conf.py
# Side by side, a worker a core; no test wants more than one thread. A group of tests that share much memory stays together.
TWO_WORKERS := -n 2 --dist loadgroup
SPHINXOPTS ?=
TORCH_INDEX ?=
# Solutions are shown as they are committed.
SOLUTIONS = rm -rf docs/solutions && cp -r solutions docs/solutions
BUILD_SITE = $(PY) -m sphinx -q -b html -d docs/_build/doctrees $(SPHINXOPTS) docs docs/_build/html
SHOW_SITE = printf '\nThe report: %s\n' "$$PWD/docs/_build/html/index.html"
# What a Python answers: its version if it will do, else nothing.
VERSION := -c 'import ensurepip, sys, venv; sys.version_info < (3, 11) or print(sys.version)' 2>/dev/null

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON

ifneq ($(PYTHON),)
GIVEN := $(shell "$(PYTHON)" $(VERSION))
ifeq ($(GIVEN),)
$(error PYTHON=$(PYTHON) is no Python 3.11 or newer with its venv module; name another, or leave PYTHON out)
else ifneq ($(wildcard .venv/bin/pip),)
ifneq ($(GIVEN),$(shell $(PY) $(VERSION)))
$(error .venv was made from another Python than PYTHON=$(PYTHON); delete .venv first, or leave PYTHON out)
endif
endif
endif

.PHONY: report check test notebooks readme lint types docs lab clean
.NOTPARALLEL:

report: $(READY)
	@rm -rf docs/notebooks
	@$(PY) tools/notebooks.py --output-dir docs/notebooks
	@$(SOLUTIONS)
	@echo 'Building the site'
	@$(BUILD_SITE)
	@$(SHOW_SITE)

check: lint
	$(PY) -m pytest -q $(TWO_WORKERS) -m "not slow" tests

test: $(READY)
	$(PY) -m pytest $(TWO_WORKERS) $(if $(M2_TEST_ALL),,-m "not long") tests
	$(PY) -m pytest -n 2 --dist loadscope --nbval notebooks solutions

# Executes the notebooks where they are: refreshes the committed outputs and the record of what each one costs.
notebooks: $(READY)
	@$(PY) tools/notebooks.py --in-place
	@$(PY) tools/notebooks.py --in-place solutions/*.ipynb

readme: $(READY)
	$(PY) -m m2helpers readme

lint: $(READY) types
	$(PY) -m ruff check $(STYLED)
	$(PY) -m ruff format --check $(STYLED)

types: $(READY)
	$(PY) -m mypy

# The site from the notebooks as they are committed; nothing is executed.
docs: $(READY)
	@rm -rf docs/notebooks && mkdir docs/notebooks && cp notebooks/*.ipynb docs/notebooks/
	@$(SOLUTIONS)
	$(BUILD_SITE)
	@$(SHOW_SITE)

lab: $(READY)
	$(PY) -m jupyterlab notebooks

# Removes what was built, and keeps .venv.
clean:
	rm -rf docs/_build docs/_autosummary docs/notebooks docs/solutions build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# pip is the last thing that making a .venv writes, so this file says that it is whole.
.venv/bin/pip:
	@if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi; \
	for python; do \
	  if [ -n "$$("$$python" $(VERSION))" ]; then \
	    echo "Making .venv with $$("$$python" --version)"; exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo 'error: no Python 3.11 or newer with its venv module was found; install one' \
	     '(Debian and Ubuntu: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; exit 1

# A server started from .venv imports the package first, which says how threads wait; its kernels take that over.
$(READY): requirements.txt constraints.txt pyproject.toml | .venv/bin/pip
	@echo 'Installing the requirements into .venv (the first time takes some minutes)'
	@$(PY) -m pip install $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt -r requirements.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -m ipykernel install --sys-prefix --name m2helpers --display-name "Python 3 (m2helpers)" >/dev/null
	@mkdir -p .venv/etc/jupyter && echo 'import m2helpers' > .venv/etc/jupyter/jupyter_server_config.py
	@touch $@
