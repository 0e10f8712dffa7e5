# Every target makes .venv on first use, then is one call of `python -m oodlib`: without make, type those calls.
#   make reproduce PROFILE=smoke|laptop|benchmark|paper  DEVICE=auto|cpu|cuda|mps  SEED=0  ARGS="-p n_test 500"
PYTHON ?= python3
PROFILE ?=
DEVICE ?=
SEED ?=
ARGS ?=

STAMP := .venv/.installed
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
OODLIB = $(PY) -m oodlib
OPTIONS = $(if $(PROFILE),--profile $(PROFILE)) $(if $(DEVICE),--device $(DEVICE)) $(if $(SEED),--seed $(SEED)) $(ARGS)

NAMES := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/[0-9]*.ipynb))
# `make 01a_gradnorm` or `make 01a`; both halves of a notebook: `make 01`, or any word of the name, `make gradnorm`
HALVES := $(foreach name,$(NAMES),$(firstword $(subst _, ,$(name))))
WORDS := $(sort $(HALVES) $(patsubst %a,%,$(HALVES:%b=%)) $(foreach name,$(NAMES),$(wordlist 2,9,$(subst _, ,$(name)))))
COMMANDS := reproduce test test-quick lab data report verify student docs lint doctor clean train-vit

.PHONY: help setup train sweep $(COMMANDS) $(NAMES) $(WORDS)

help:
	@$(PYTHON) -m oodlib --help

setup: $(STAMP)

# uv (on PATH, else from the package index) installs faster than pip; pip's index address holds for it too
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "Installing the packages of requirements.lock into .venv: about 3 GB to fetch."
	@command -v uv >/dev/null || $(PIP) install --quiet uv || echo "uv is not available; pip does the work."
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; \
	index=$${PIP_INDEX_URL:-$$($(PIP) config get global.index-url 2>/dev/null)}; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; fi; \
	uv pip install --python $(PY) -r requirements.lock || $(PIP) install -r requirements.lock
	$(PIP) install --no-deps -e .
	touch $(STAMP)

$(COMMANDS): $(STAMP)
	$(OODLIB) $@ $(OPTIONS)

# NAME= says which checkpoint
train: $(STAMP)
	$(OODLIB) train $(OPTIONS) $(NAME)

# POOL= says which table of data/pools
sweep: $(STAMP)
	$(OODLIB) sweep --pool $(POOL) $(OPTIONS)

$(NAMES) $(WORDS): $(STAMP)
	$(OODLIB) notebook $@ $(OPTIONS)
