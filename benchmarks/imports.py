"""A new process and its first call, of a file that is cached: what importing rankload costs beyond torch.

Every rank is forked from a process that has imported torch and nothing of rankload; the files are ResNet-50's 102 MB.
"""

from __future__ import annotations

import compileall
from collections.abc import Iterator
from pathlib import Path

import rankload
from benchmarks.import_ways import WAYS, timed
from benchmarks.modules import write_files
from benchmarks.rounds import interleaved
from benchmarks.table import Table
from harness.ranks import start_ranks


def imports(rounds: int, scratch: Path) -> Iterator[Table]:
    """Yield a table for one process, and one for four ranks."""
    files = write_files(scratch, "resnet", 0)
    compileall.compile_dir(Path(rankload.__file__).parent, quiet=1)  # as pip does when it installs a package
    for world_size in (1, 4):
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for name in interleaved(list(WAYS), rounds):
            with start_ranks(timed, world_size, args=(WAYS[name], files.url, str(files.zip.parent))) as group:
                group.wait_for_mark("ready", timeout_seconds=300)
                group.open_gate("ready")
                seconds[name].append(max(result.value for result in group.wait()))
        yield Table(
            f"imports-{world_size}",
            f"first call of new processes, warm, {world_size} ranks, {files.size_bytes / 1e6:.0f} MB, medians of "
            f"{rounds}, slowest rank",
            seconds,
        )
