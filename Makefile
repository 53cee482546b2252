# The everyday commands. Each one sets up .venv by itself and only with what it needs; a second call starts at once.
# Needed on the machine: Python 3.11 or newer with its venv module, and make.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PINS := -c constraints.txt
DECLARED := pyproject.toml constraints.txt
# Ethereum's executable specification, the oracle of a slow test. It needs older cryptography than we do.
EELS_VENV := .venv-eels
EELS := ethereum-execution==2.20.0

# Which interpreter builds .venv: the first that is new enough and has venv.
PYTHON ?=
# Where torch comes from. `auto` is the small CPU build, or pip's own index (CUDA, several GB) when an NVIDIA driver is
# found. A wheel that pip finds locally (find-links) wins over both, without the network.
TORCH_INDEX ?= auto
TORCH := torch==$(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

# pytest processes. Each keeps to one thread, so that two cores serve two of them.
JOBS ?= 2
# How many times as long the random walks of `make fuzz` are: 10 takes a quarter of an hour on two cores.
FUZZ ?= 10
# More words for the command behind a target: make up ARGS="--once --json", make test ARGS="-k merkle".
ARGS ?=
# Compiled modules are kept, whatever the shell says: the tests start a hundred processes that import the same ones.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help up test test-slow test-all fuzz check format golden bench docs install install-test install-dev install-eels \
  clean distclean

help:
	@echo "make up         set up and run the whole economy on this machine   (ARGS=\"--once --json\")"
	@echo "make test       set up and run the tests, under four minutes       (ARGS=\"-k merkle\")"
	@echo "make test-slow  the slow tests alone; make test-all runs both"
	@echo "make fuzz       long random walks beside the contracts' twins, any request to the gateway    (FUZZ=10)"
	@echo "make check      format, lint, types, import rules, dependencies"
	@echo "make format     let ruff format and fix what it can"
	@echo "make golden     rewrite the recorded bytes, gas and schemas"
	@echo "make bench      run the benchmarks                                 (ARGS=--quick)"
	@echo "make docs       check that every example and command in the docs runs"
	@echo "make clean      remove caches and builds; make distclean removes .venv too"

up: install
	@$(BIN)/tessera up $(ARGS)

test: install-test
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: install-test install-eels
	@$(PYTEST) -m slow $(ARGS)

fuzz: install-test
	@TESSERA_FUZZ=$(FUZZ) $(PYTEST) tests/stateful tests/attacks/test_serving_any_request.py -m slow $(ARGS)

test-all: install-test install-eels
	@$(PYTEST) $(ARGS)

check: install-dev
	@failed=; \
	for tool in "ruff format --check" "ruff check" mypy lint-imports "deptry src"; do \
	  echo "$$tool"; $(BIN)/$$tool || failed="$$failed, $$tool"; \
	done; \
	if [ -n "$$failed" ]; then echo "Not clean: $${failed#, }" >&2; exit 1; fi

format: install-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

golden: install-test
	@$(TEST_ENV) $(BIN)/python -m pytest tests/golden --update-golden $(ARGS)
	@git diff --stat -- specs tests/golden 2>/dev/null || true  # not in a tarball

bench: install
	@for file in benchmarks/bench_*.py; do echo "$$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

docs: install-test
	@$(TEST_ENV) $(BIN)/python -m pytest tests/docs $(ARGS)

clean:
	@rm -rf build dist node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV) $(EELS_VENV) src/*.egg-info

# --- setting up: a chain of stamps, so that `make -j` never runs two pips at once

install: $(VENV)/.stamp-run
install-test: $(VENV)/.stamp-test
install-dev: $(VENV)/.stamp-dev
install-eels: $(EELS_VENV)/.stamp

# What the loop below asks of an interpreter. Debian splits ensurepip off into python3-venv.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
HAS_VENV := import venv, ensurepip

$(VENV)/.stamp-venv:
	@found=; old=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3); do \
	  "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null || continue; \
	  if "$$python" -c '$(HAS_VENV)' 2>/dev/null; then found="$$python"; break; fi; \
	  old="$$python"; \
	done; \
	if [ -z "$$found" ] && [ -n "$$old" ]; then \
	  echo "$$old has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	elif [ -z "$$found" ]; then \
	  echo "$(or $(PYTHON),python3) is not Python 3.11 or newer. On Debian and Ubuntu: apt-get install python3 python3-venv" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$found" --version) (once, about 5 s)"; \
	"$(BIN)/python" -c '$(NEW_ENOUGH)' 2>/dev/null || "$$found" -m venv --clear $(VENV)
	@touch $@

# A CPU-only machine would otherwise get PyPI's CUDA build.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@if $(PIP) install $(PINS) --no-index --no-deps "$(TORCH)" >/dev/null 2>&1; then touch $@; exit 0; fi; \
	index="$(TORCH_INDEX)"; what="from $$index"; \
	if [ "$$index" = auto ]; then \
	  if [ "$$(uname -s)" != Linux ]; then index=; what="for $$(uname -s)"; \
	  elif [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then index=; what="CUDA build (several GB)"; \
	  else index=https://download.pytorch.org/whl/cpu; what="CPU build (200 MB)"; fi; \
	fi; \
	echo "Installing $(TORCH), $$what (once, a minute or more)"; \
	$(PIP) install $(PINS) --no-deps $${index:+--index-url "$$index"} "$(TORCH)" || { \
	  echo "$(TORCH) did not install. TORCH_INDEX=<url> names another index, PIP_FIND_LINKS=<folder> a local wheel." >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch $(DECLARED)
	@echo "Installing what a run needs: chain, peers, models, gateway (once, about 1 min)"
	@$(PIP) install $(PINS) -e '.[train,serve,agents]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	@echo "Installing what the tests need (once, about 1 min)"
	@$(PIP) install $(PINS) -e '.[train,serve,agents,data,postgres,test]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-test
	@echo "Installing what the checks need (once, about 20 s)"
	@$(PIP) install $(PINS) -e '.[train,serve,agents,data,postgres,test,dev]'
	@touch $@

$(EELS_VENV)/.stamp: $(VENV)/.stamp-venv Makefile
	@echo "Installing $(EELS) in $(EELS_VENV), for one slow test (once, about 30 s)"
	@$(BIN)/python -m venv --clear $(EELS_VENV)
	@$(EELS_VENV)/bin/python -m pip --disable-pip-version-check -qq install $(EELS)
	@touch $@
