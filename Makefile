# `make demo` and `make test` each set up what they need in .venv, and then run.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint benchmark clean

demo: $(INSTALLED)
	$(VENV)/bin/dpo-fast demo --output demo --overwrite

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 2

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark: $(INSTALLED)
	$(VENV)/bin/python benchmarks/peers.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,openvino,peft,trl,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build demo
