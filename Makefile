# `make demo` and `make test` do all of their own set-up, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help setup demo test lint types tests test-slurm test-install dist docs fuzz figures benchmark-memory bench bench-data gpu-check experiments zoo chaos long-run mutate op-zoo clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## virtual environment with every dependency

$(VENV)/.ready: pyproject.toml scripts/setup_env.sh
	PYTHON=$(PYTHON) bash scripts/setup_env.sh $(VENV)
	@touch $@

demo: setup  ## meta-train MAML on glyphs, validate, test
	$(BIN)/metarun train experiment=demo

test: lint types tests  ## everything that must pass

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

tests: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

test-slurm: setup  ## sweeps and preemption on a real one-node SLURM (root on Debian: installs it)
	bash scripts/test_slurm.sh $(BIN)/python

test-install: ## install the wheel with pip, from nothing, under each Python 3.11-3.13 found
	bash scripts/test_install.sh

dist: setup  ## source distribution and wheel in dist/, as an index would take them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

docs: setup  ## the site of the documentation, in build/site; its notebooks are executed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m mkdocs build -f scripts/site/mkdocs.yml

figures: setup  ## the pictures of the README
	$(BIN)/python scripts/draw_glyphs.py --out docs/glyphs.png
	$(BIN)/python scripts/compare_optimizers.py --out docs/optimizers.png

fuzz: setup  ## 10,000 damaged checkpoints, run directories and command lines
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --cases 10000 --seed 0

benchmark-memory: setup  ## memory and time of each gradient mode, and the figure of docs/unroll.md
	$(BIN)/python scripts/unroll_memory.py --out docs/unroll_memory

# The device of the benchmark: make bench device=cuda
device ?= cpu

bench: setup  ## metarun against its peers; device=cuda for a GPU: an hour or two
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python scripts/bench --device $(device)

bench-data: setup  ## converting pictures and drawing episodes, against torchvision and learn2learn
	$(BIN)/python -W ignore scripts/bench_data.py

gpu-check: setup  ## all that a GPU is asked, in ten minutes; device=cpu for a rehearsal
	bash scripts/gpu_check.sh $(if $(filter command\ line,$(origin device)),$(device),cuda)

experiments: setup  ## the figures of the README: real trainings, minutes on two cores
	bash scripts/reproduce.sh

zoo: setup  ## one table of all methods on Omniglot, trained for 6 minutes each: a day or two on one core
	$(BIN)/python scripts/zoo.py

chaos: setup  ## the fault campaign of docs/reliability.md: about an hour on two cores
	$(BIN)/python scripts/chaos.py

long-run: setup  ## memory, open files and log sizes over 12,000 meta-steps: a few minutes
	$(BIN)/python scripts/long_run.py

mutate: setup  ## break the code in two hundred places, one by one: do the tests notice?
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutate.py --jobs 2

op-zoo: setup  ## derivatives of every operation against finite differences, and docs/operations.md
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore scripts/op_zoo

clean:  ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
