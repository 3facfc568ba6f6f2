# The few commands of a working day. Each calls a script or tool that also works by itself; all of them use
# the environment that local/env.sh finds or makes.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help test quick docs gpu benchmark lint format types readme results

python = root="$(CURDIR)"; . local/env.sh espeak,test; "$$KDRECIPE_PY"

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

test:  ## the whole suite
	tests/run.sh

quick:  ## what takes a few minutes: unit tests and contracts
	tests/run.sh tests/unit tests/contracts

docs:  ## the documents against the code
	tests/run.sh tests/docs

gpu:  ## what needs a GPU: its results beside the CPU's
	tests/gpu.sh

benchmark:  ## a GPU's figures, as a Markdown page
	benchmarks/gpu.sh

lint:  ## ruff: rules and format
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

format:  ## ruff: correct what it can
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

types:  ## mypy
	@$(python) -m mypy

readme:  ## fill the README's generated blocks
	@$(python) docs/fill_readme.py

results:  ## every committed table again (hours), then the README's figures
	@$(python) -m kdrecipe.cli regenerate
	@$(python) docs/fill_readme.py
