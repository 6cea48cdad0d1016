#!/usr/bin/env bash
# Runs the benchmarks in the tests' environment: ./benchmarks/run.sh [CASE] [--rounds N] [--size-mb N]; --help lists the cases
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/venv.sh test bench
PYTHONPATH=tests exec .venv/bin/python -m benchmarks "$@"
