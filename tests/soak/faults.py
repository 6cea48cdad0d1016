"""The whole fault suite many times in a row: whatever fails once is a failure.

PYTHONPATH=tests:src python -m soak.faults --times 20 [words for pytest, such as -n 2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parents[1]


def main(words: Sequence[str] | None = None) -> int:
    """Runs every test that has the ``fault`` marker; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m soak.faults", description=main.__doc__)
    parser.add_argument("--times", type=int, default=20)
    options, for_pytest = parser.parse_known_args(words)
    failures, began_at = Counter[str](), time.monotonic()
    for number in range(1, options.times + 1):
        failures.update(_run_once(number, for_pytest))
    for test, count in failures.most_common():
        print(f"faults: failed in {count} of {options.times}: {test}")
    seconds = time.monotonic() - began_at
    print(f"faults: {options.times} times in {seconds:.0f} s, {len(failures)} tests failed", flush=True)
    return 1 if failures else 0


def _run_once(number: int, for_pytest: Sequence[str]) -> list[str]:
    began_at = time.monotonic()
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "fault", "-p", "no:cacheprovider", "-rfE", *for_pytest]
    result = subprocess.run(argv, check=False, cwd=TESTS_DIR.parent, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode and not failed:  # it could not even collect
        failed = [f"pytest itself, exit status {result.returncode}"]
    if failed:
        print(result.stdout[-20_000:], result.stderr[-5000:], sep="\n")
    summary = lines[-1].strip("= ") if lines else "no output"
    print(f"time {number}: {summary} ({time.monotonic() - began_at:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
