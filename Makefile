PYTHON ?= python3
PIP = .venv/bin/pip install --disable-pip-version-check --constraint constraints.txt

# Where this is set, every process that a test starts would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: getp test clean help

getp: .venv/getp  ## set up .venv, then run data/input.txt through the embedded model
	.venv/bin/python run.py -m getp -i data/input.txt -o output.txt

test: .venv/test  ## set up .venv, then lint, type check and test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest --numprocesses 2 --dist worksteal

# torch is installed first and alone, at the pinned version, so that no other requirement selects a
# different build of it. pip is not quiet: this takes minutes.
.venv/torch: constraints.txt
	@echo "Installing torch, then getp, into .venv: pip shows what it downloads and how large it is"
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/getp: .venv/torch pyproject.toml
	$(PIP) --editable .
	touch $@

# Without .venv/getp, so that the native kernels are compiled once. --no-compile saves time: the
# tests import only a small part of these packages.
.venv/test: .venv/torch pyproject.toml
	$(PIP) --no-compile --editable '.[test]'
	touch .venv/getp $@

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /make \1\t/p' Makefile

clean:  ## remove .venv and all build and cache folders
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
