PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: getp test clean

getp: .venv/getp  ## set up, then run data/input.txt through the embedded model
	.venv/bin/python run.py -m getp -i data/input.txt -o output.txt

test: .venv/test  ## set up, then lint, type check and test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest --numprocesses 2 --dist worksteal

# torch goes first and alone: pinned, so that no other requirement picks another build of it.
.venv/getp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# Not compiled: tests import a small part of it.
.venv/test: .venv/getp
	$(PIP) --no-compile --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
