# Every target makes .venv on first use, then is one call of `python -m oodlib`: without make, type those calls.
#   make reproduce PROFILE=smoke|laptop|benchmark|paper  DEVICE=auto|cpu|cuda|mps  SEED=0  ARGS="-p n_test 500"
PYTHON ?= python3
PROFILE ?=
DEVICE ?=
SEED ?=
ARGS ?=

STAMP := .venv/.installed
PY := .venv/bin/python
OODLIB = $(PY) -m oodlib
OPTIONS = $(if $(PROFILE),--profile $(PROFILE)) $(if $(DEVICE),--device $(DEVICE)) $(if $(SEED),--seed $(SEED)) $(ARGS)

NAMES := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/[0-9]*.ipynb))
# `make 01a_gradnorm` or `make 01a`; both halves of a notebook: `make 01`, or any word of the name, `make gradnorm`
HALVES := $(foreach name,$(NAMES),$(firstword $(subst _, ,$(name))))
WORDS := $(sort $(HALVES) $(patsubst %a,%,$(HALVES:%b=%)) $(foreach name,$(NAMES),$(wordlist 2,9,$(subst _, ,$(name)))))
COMMANDS := reproduce test lab data report verify student docs lint doctor clean train-vit

.PHONY: help setup train sweep $(COMMANDS) $(NAMES) $(WORDS)

help:
	@$(PYTHON) -m oodlib --help

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps -e .
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
