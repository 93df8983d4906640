# The two commands of the README. Each makes its own virtual environment and installs what it needs.
PYTHON ?= python3
RUN_VENV ?= .venv
TEST_VENV ?= .venv-test

.PHONY: quickstart test check

quickstart: $(RUN_VENV)/.installed
	$(RUN_VENV)/bin/mobillama quickstart

test: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/pytest -n 2 --durations 10

check: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

$(RUN_VENV)/.installed: EXTRA = hf
$(TEST_VENV)/.installed: EXTRA = dev
%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mobillama needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA)]'
	touch $@
