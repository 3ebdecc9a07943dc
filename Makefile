# Two commands for a fresh machine: `make demo` and `make test`.
#
#   make demo [STUDY=file.yaml] [DATA=folder] [OUT=folder]
#   make test
#
# TORCH_INDEX: index to take PyTorch from, for example PyTorch's own CPU index on a machine without
# a GPU whose default index offers the CUDA build alone.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
VENV := .venv
RUN := $(VENV)/bin/python
TORCH := torch==2.13.0
TORCH_INDEX ?=
OUT ?= demo-state
# Files that take minutes begin first, and those that share a federation go together (conftest.py).
SPREAD := --dist loadgroup --no-loadscope-reorder
# Unit tests write durably thousands of times: in memory, where it has 4 GB to spare.
SCRATCH := $(shell test "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 4000000 \
  2>/dev/null && echo /dev/shm || echo "$${TMPDIR:-/tmp}")
# Tests share the machine with the processes they start: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint unit integration long soak benchmarks clean

demo: $(VENV)/.runtime
	@$(RUN) -m consilium_common demo --out "$(OUT)" \
	  $(if $(STUDY),--study "$(STUDY)") $(if $(DATA),--data "$(DATA)")

# The first two side by side: types are checked on one processor.
test:
	@$(MAKE) --no-print-directory -j2 lint unit
	@$(MAKE) --no-print-directory integration
	@$(MAKE) --no-print-directory long

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

unit: $(VENV)/.dev
	folder=$$(mktemp -d -p "$(SCRATCH)") && trap 'rm -rf "$$folder"' EXIT && \
	  $(RUN) -m pytest tests/unit -m "not long" -n 2 \
	  --basetemp "$$folder/tests" -o tmp_path_retention_policy=failed

integration: $(VENV)/.dev
	$(RUN) -m pytest tests/integration tests/faults -m "not long and not soak" $(SPREAD) -n 3

# The second stage: real studies on real images, through real processes.
long: $(VENV)/.dev
	$(RUN) -m pytest tests -m long $(SPREAD) -n 2

# Delay, loss, a cut line and a new address, in network namespaces. CONSILIUM_LONG_FAULTS=1 cuts the
# line for ten minutes in place of twenty seconds.
soak: $(VENV)/.dev
	$(RUN) -m pytest tests/faults -m soak

benchmarks: $(VENV)/.dev
	for file in tests/benchmarks/*.py; do $(RUN) "$$file" || exit 1; done

clean:
	rm -rf $(VENV) demo-state

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; found $$("$(PYTHON)" --version). Give PYTHON=…"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# PyTorch first and alone, so that no dependency pulls another build of it.
$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
