"""The frame of every soak: runs with a seed each, a line each, a summary, and a status that tells of violations."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import environments

#: One run: gets its randomness and an empty directory, returns what it was and how it ended. A violation is an
#: AssertionError.
Run = Callable[[random.Random, Path], tuple[str, str]]


def main(name: str, run: Run, words: Sequence[str] | None = None) -> int:
    """Runs again and again; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m soak.{name}", description=run.__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count up from it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long")
    options = parser.parse_args(words)
    outcomes, began_at, violations = Counter[str](), time.monotonic(), 0
    for seed in range(options.seed, options.seed + options.runs):
        if time.monotonic() - began_at > options.seconds:
            break
        outcome = _one(run, seed)
        violations += outcome == "VIOLATION"
        outcomes[outcome] += 1
    seconds = time.monotonic() - began_at
    shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{name}: {outcomes.total()} runs from seed {options.seed} in {seconds:.0f} s: {shown}", flush=True)
    return 1 if violations else 0


def _one(run: Run, seed: int) -> str:
    directory = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
    began_at = time.monotonic()
    try:
        what, outcome = run(random.Random(seed), directory)
    except Exception as error:
        traceback.print_exc()
        what, outcome = f"{type(error).__name__}; its files are kept in {directory}", "VIOLATION"
    else:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"seed {seed}: {outcome} ({what}, {time.monotonic() - began_at:.1f} s)", flush=True)
    return outcome


def start(name: str, run: Run) -> None:
    """Entry point of a soak that is run as a program: away from the machine's own settings, like the tests."""
    import os

    for variable in list(os.environ):
        if environments.is_stray(variable):
            del os.environ[variable]
    sys.exit(main(name, run))
