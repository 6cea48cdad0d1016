# `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup lint test unit faults docs docs-serve demo bench soak

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## set up .venv for development
	launch/venv.sh test

lint: setup  ## style, types and layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test:  ## everything that CI runs
	tests/run.sh

unit:  ## the unit tests
	tests/run.sh tests/unit -n 2

faults: setup  ## write docs/faults.md from the table of cases
	PYTHONPATH=tests .venv/bin/python -m faults.write_docs

docs: setup  ## build the site into build/site, with every warning an error
	.venv/bin/mkdocs build --strict

docs-serve: setup  ## show the site at http://127.0.0.1:8000 while you write
	.venv/bin/mkdocs serve --strict

demo:  ## a real checkpoint into 4 ranks: torch.hub's way, then this way
	launch/demo.sh

bench:  ## side by side with peers
	benchmarks/run.sh

soak: setup  ## 300 runs with random faults at random moments
	PYTHONPATH=tests .venv/bin/python -m soak.chaos --runs 300
