# Set-up, tests and checks. `make` alone lists what there is.

PYTHON    ?= python3
VENV      := .venv
BIN       := $(VENV)/bin
STAMP     := $(VENV)/.installed
DOCS      := $(VENV)/.docs-installed
EXAMPLE   := $(VENV)/.example-installed
# Passed to every `pip install`, e.g. PIP_ARGS="--find-links wheels" for a CPU or CUDA build of torch.
PIP_ARGS  ?=
# The exact versions that CI passed, so that a fresh machine in a year still starts; LATEST=1 goes
# without them, to the newest that pyproject.toml admits.
LATEST    ?=
PINS      := $(if $(LATEST),,--constraint constraints.txt)
# What pytest runs, and further arguments for it, e.g. TESTS=tests/unit TEST_ARGS="-k report".
TESTS     ?= tests
TEST_ARGS ?=
# Processes that share the tests; 0 runs them in pytest's own, as a debugger needs it.
WORKERS   ?= 2
# Of the quick start: a text file instead of its own; weak or strong; runs of each setting.
TEXT      ?=
TEACHER   ?= weak
SEEDS     ?= 3
# Of example-hf: a folder with the teacher, instead of the package from PyPI.
MODEL     ?=
# The version range of torch, read from its only owner.
TORCH     := $(shell sed -n 's/^ *"\(torch[<>=!~][^"]*\)".*/\1/p' pyproject.toml)
# The extra `docs`, by itself: with the package pip would compile the kernels again.
MKDOCS    := $(shell sed -n '/^docs = /s/^docs = \[\(.*\)\]/\1/p' pyproject.toml | sed 's/", "/" "/g')
# The extra `example-hf`, by itself for the same reason.
GGUF      := $(shell sed -n '/^example-hf = /s/^example-hf = \[\(.*\)\]/\1/p' pyproject.toml | sed 's/", "/" "/g')

.DEFAULT_GOAL := help
.PHONY: help setup test test-fast checks constraints format golden quickstart example-hf docs \
	bench gpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv, install the package and its tools (PYTHON=python3.12, LATEST=1 for the newest)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "megatron_salt needs Python 3.11 or newer, '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true). Choose another: make setup PYTHON=python3.12" >&2; \
		exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		rm -rf $(VENV); exit 1; }
	@# torch comes first and alone: pip then takes the build it is configured for (a CPU wheel, say)
	@# before the other packages' looser requirements can choose one.
	$(BIN)/python -m pip install --quiet $(PINS) $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PINS) $(PIP_ARGS) -e ".[dev]"
	$(BIN)/python -m megatron_salt.kernels
	@touch $@

test: setup ## run the tests (TESTS=tests/unit TEST_ARGS="-k report" for some of them)
	@# worksteal: a process that has run out of tests takes half of what another has left, from the
	@# end, so that nearly every file's fixtures are made once.
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS) $(TEST_ARGS)

test-fast: setup ## the unit tests that start no processes and compile nothing, between two commits
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not processes" tests/unit $(TEST_ARGS)

checks: setup ## lint, formatting, types and spelling, as before every commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_salt
	$(BIN)/codespell

constraints: ## write the versions in .venv to constraints.txt; after `make setup LATEST=1` has passed the tests
	@# Without what pip chooses by itself for a build of torch: its local version, its CUDA packages.
	@echo "# The versions that CI passed. Written by: make constraints" > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' | \
		grep -vE '^(nvidia-|cuda-|triton==)' >> constraints.txt

format: setup ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: setup ## record tests/golden/losses.json anew and print what moved; say in the commit why it may
	$(BIN)/python tests/golden_losses.py

quickstart: setup ## SALT and its baseline on this machine (TEXT=my.jsonl, TEACHER=strong, SEEDS=1)
	$(BIN)/python examples/quickstart/run.py --output runs/quickstart --teacher $(TEACHER) \
		--seeds $(SEEDS) $(if $(TEXT),--text $(TEXT))

example-hf: $(EXAMPLE) ## a published model teaches, and the student is published (MODEL=my/folder)
	$(BIN)/python examples/huggingface/run.py --output runs/example-hf $(if $(MODEL),--model $(MODEL))

$(EXAMPLE): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PINS) $(PIP_ARGS) $(GGUF)
	@touch $@

docs: $(DOCS) ## the documentation as pages that need no network, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PINS) $(PIP_ARGS) $(MKDOCS)
	@touch $@

bench: setup ## benchmarks of the loss on this machine's CPU; writes benchmarks/results/
	$(BIN)/python benchmarks/kd_loss_cpu.py

gpu: setup ## GPU tests and benchmarks on this machine's GPU; writes benchmarks/results/
	$(BIN)/python -m megatron_salt.kernels --require cuda
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python benchmarks/kd_loss_gpu.py
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck; do \
			compute-sanitizer --error-exitcode 1 --tool $$tool \
				$(BIN)/python benchmarks/sanitize_kd_loss.py || exit 1; \
		done; \
	else echo "compute-sanitizer is not on the path: memory and race checks have not run"; fi

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist *.egg-info megatron_salt/kernels/lib .pytest_cache .ruff_cache .mypy_cache \
		.hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
