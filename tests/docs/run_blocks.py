"""Run a page's blocks: Python in ranks, shell in bash."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import tomlkit

from docs.blocks import Block, ranks_of
from docs.example_world import World
from harness.ranks import run_ranks
from harness.scripts import run_program

#: Less than pytest's own, which shows less.
_TIMEOUT_SECONDS = 150


def run_page(page: Path, blocks: Sequence[Block], world: World) -> None:
    """Run all blocks in the order of the page. Python blocks that follow one another share a process."""
    for kind, group in groupby(_runnable(blocks, world), key=lambda block: (block.language, block.environment)):
        found = list(group)
        if kind[0] == "python":
            run_python(found, world, ranks_of(page))
        else:
            for block in found:
                run_shell(block, world)


def check_syntax(block: Block) -> None:
    """Check a block without running it."""
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "sh":
        done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{block.where}: {done.stderr}"
    elif block.language == "toml":
        tomlkit.parse(block.text)


def run_python(blocks: Sequence[Block], world: World, world_size: int) -> None:
    """Run blocks in one namespace on so many ranks; raises what a rank raised, with the page's line numbers."""
    env = {**world.environment, **_variables(blocks[0])}
    results = run_ranks(
        _run_on_rank,
        world_size,
        _TIMEOUT_SECONDS,
        env="torchrun" if world_size > 1 else "none",
        rank_env=dict.fromkeys(range(world_size), env),
        args=(
            [(block.where, block.line, block.text, block.given, block.raises) for block in blocks],
            str(world.directory),
        ),
    )
    for result in results:
        assert result.exception is None and result.exitcode == 0, result.describe()


def run_shell(block: Block, world: World) -> None:
    """Run a block as a script of bash that stops at the first command that fails."""
    done = run_program(
        ["bash", "-euo", "pipefail", "-c", block.text],
        _TIMEOUT_SECONDS,
        env={**world.environment, **_variables(block)},
        working_dir=world.directory,
    )
    assert done.exitcode == 0, f"{block.where}: exit status {done.exitcode}\n{done.stdout}\n{done.stderr}"


def _runnable(blocks: Sequence[Block], world: World) -> Iterator[Block]:
    for block in blocks:
        if block.language not in ("python", "sh"):
            continue
        check_syntax(block)
        if block.not_run:
            continue
        block = replace(block, text=world.translated(block.text), environment=world.translated(block.environment))
        if block.file:
            (world.directory / block.file).write_text(block.text)
        else:
            yield block


def _variables(block: Block) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in block.environment.split())


def _run_on_rank(rank: int, blocks: Sequence[tuple[str, int, str, str, str]], directory: str) -> None:
    import pytest
    import torch.distributed as dist

    os.chdir(directory)
    sys.path.insert(0, directory)  # as of a script that lies there
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for where, line, text, given, raises in blocks:
        if given:
            namespace.update(_given(given))
        code = compile("\n" * (line - 1) + text, where.rpartition(":")[0], "exec")
        with pytest.raises(_error_type(raises)) if raises else nullcontext():
            exec(code, namespace)
    if dist.is_initialized():
        dist.destroy_process_group()


def _given(names: str) -> dict[str, Any]:
    import docs.given

    return {name: getattr(docs.given, name) for name in names.split(", ")}


def _error_type(name: str) -> type[BaseException]:
    import rankload.errors

    found: type[BaseException] = getattr(rankload.errors, name)
    return found
