# `make demo` and `make test` each set up what they need in .venv, and then run.
PYTHON ?= python3
VENV := .venv
# TensorRT's and CUDA's Python bindings, without the libraries behind them: what is called is checked against them.
BINDINGS := build/tensorrt-11.4 build/tensorrt-10.16 build/cuda-python build/vllm
UNPACK = $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint benchmark benchmark-gpu clean

demo: $(INSTALLED)
	$(VENV)/bin/dpo-fast demo --output demo --overwrite

# One process more than two cores: tests of servers and clusters wait a good part of their time.
test: lint $(BINDINGS)
	$(VENV)/bin/python -m pytest --numprocesses 3

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark: $(INSTALLED)
	$(VENV)/bin/python benchmarks/peers.py

benchmark-gpu: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu --verify
	$(VENV)/bin/python -m benchmarks.gpu

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,openvino,peft,trl,modelopt,sign,report,trackers,ray,s3,dev]'
	touch $(INSTALLED)

build/tensorrt-11.4: | $(INSTALLED)
	$(UNPACK) tensorrt-cu13-bindings==11.4.0.106

build/tensorrt-10.16: | $(INSTALLED)
	$(UNPACK) tensorrt-cu13-bindings==10.16.1.11

build/cuda-python: | $(INSTALLED)
	$(UNPACK) cuda-bindings==13.4.4 cuda-pathfinder==1.9.0

# A server that nobody here wrote, to verify: in a folder of its own, for it brings other versions.
build/vllm: tests/endpoint_server.txt | $(INSTALLED)
	$(UNPACK) -r tests/endpoint_server.txt
	touch $@

clean:
	rm -rf $(VENV) build demo
