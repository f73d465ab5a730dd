# make run | test | lint | smoke | conformance | nightly | mutants | hosts-soak | compare | compile-test | ptx-worlds
#      | ptx-faults | clean
# Everything is installed into .venv and nothing outside this folder is changed.
PYTHON ?= python3
PRESET ?= laptop-text
RANKS ?= 8
WORKLOAD ?= text
SEED ?= 0
PROCESSES ?= 2

# Tests of a file run in one process, whose fixtures they share. One that dies, as at a test's time limit, ends the run.
SPREAD := --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input

.PHONY: help run test lint smoke conformance nightly mutants hosts-soak compare compile-test ptx-worlds ptx-faults clean

help:
	@echo "make run    one MoE layer on $(RANKS) ranks of this machine (PRESET=$(PRESET) RANKS=$(RANKS) WORKLOAD=$(WORKLOAD))"
	@echo "make test   all tests, in PROCESSES=$(PROCESSES)           make lint    ruff and mypy"
	@echo "make smoke  every experiment, small              make clean   remove what make made"
	@echo "make nightly   every target for a night, and all tests on more worlds, sizes and kernels (as root)"
	@echo "make mutants   small faults in copies of the source, which tests must notice (SEED=$(SEED); for a night)"
	@echo "make hosts-soak   layers on hosts that lose ranks, hosts and cables, and 10,000 calls there (as root; for a night)"
	@echo "make compare BASE=COMMIT   do HEAD and that commit compute the same? with their lines of code, and speeds in turn"
	@echo "make ptx-faults     faults planted in the linked kernels, which their machine must find (for a night)"
	@echo "make conformance   beside PyTorch and transformers: models generate the same text"
	@echo "make compile-test   build the kernels for GPUs, without one, and check their machine code"
	@echo "make ptx-worlds   execute every kernel for GPUs on small worlds, without a GPU; which instructions ran (for a night)"

run: .venv/for-run
	@mkdir -p out
	.venv/bin/flashmoe run --preset $(PRESET) --ranks $(RANKS) --workload $(WORKLOAD) \
	    --trace out/trace.json --plot out/timeline.png --json out/run.json

test: .venv/for-dev
	.venv/bin/python tests/compile_ahead.py layers
	.venv/bin/python -m pytest $(SPREAD)

lint: .venv/for-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

smoke: .venv/for-dev
	@set -e; for script in experiments/[0-9]*.py; do \
	    [ -e "$$script" ] || { echo "no experiments yet"; break; }; \
	    echo "$$script --smoke"; .venv/bin/python "$$script" --smoke; \
	done

# PyTorch and transformers are some 1.5 GB, so they come only here; `make test` skips what needs them.
conformance: .venv/for-conformance
	.venv/bin/python -m pytest $(SPREAD) tests/pytorch tests/conformance
	.venv/bin/python experiments/40_model.py --smoke
	.venv/bin/python experiments/43_train.py --smoke

nightly:
	.ci/nightly

mutants: .venv/for-dev
	PYTHONPATH=tests .venv/bin/python -m mutants --seed $(SEED)

hosts-soak: .venv/for-dev
	HYPOTHESIS_PROFILE=nightly .venv/bin/python -m pytest tests/hosts
	.venv/bin/python experiments/34_lost_hosts.py --runs 200
	.venv/bin/python experiments/35_hosts_soak.py --hosts 2 --ranks-per-host 4 --load 2
	.venv/bin/python experiments/35_hosts_soak.py --hosts 3 --ranks-per-host 2 --load 2

compare: .venv/for-dev
	.venv/bin/python tests/compare_commits.py $(BASE) --speed 5

# Compilers for GPUs are some 530 MB and NVSHMEM 310, so they come only here; `make test` skips what needs them.
compile-test: .venv/for-compile
	.venv/bin/python tests/compile_ahead.py gpu
	.venv/bin/python -m pytest $(SPREAD) tests/compile

ptx-worlds: .venv/for-compile
	.venv/bin/python tests/run_ptx_worlds.py --json out/ptx-worlds.jsonl

# Some hours on two processes. What out/ptx_faults.jsonl knows already is not done again.
ptx-faults: .venv/for-compile
	@mkdir -p out
	PYTHONPATH=tests .venv/bin/python tests/ptx_faults.py out/ptx_faults.jsonl
	PYTHONPATH=tests .venv/bin/python tests/ptx_faults_report.py out/ptx_faults.jsonl docs/ptx_faults.md

clean:
	rm -rf .venv out build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamps make an install happen once, and again when the requirements change.
.venv/for-run: .venv/made setup.cfg pyproject.toml
	$(PIP) install --editable '.[mpi,plots]'
	@touch $@

.venv/for-dev: .venv/made setup.cfg pyproject.toml
	$(PIP) install --editable '.[dev]'
	@touch $@ .venv/for-run

.venv/for-compile: .venv/made setup.cfg pyproject.toml
	$(PIP) install --editable '.[dev,compile]' nvidia-nvshmem-cu13 # whose headers are all that building needs
	@touch $@ .venv/for-run .venv/for-dev

.venv/for-conformance: .venv/made setup.cfg pyproject.toml
	$(PIP) install --editable '.[dev,conformance]'
	@touch $@ .venv/for-run .venv/for-dev

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { \
	    rm -rf .venv; echo "No virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@
