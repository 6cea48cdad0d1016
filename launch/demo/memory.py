"""How much memory this process holds, counted so that the ranks' figures may be added up."""

import os
import subprocess
from pathlib import Path

_ROLLUP_PATH = Path("/proc/self/smaps_rollup")


def kind() -> str:
    """``"PSS"`` where the kernel tells it, else ``"RSS"``.

    PSS counts a page that n processes share as 1/n in each of them. RSS counts it in full in every one, so
    there the sum over ranks hides what they share.
    """
    return "PSS" if _ROLLUP_PATH.exists() else "RSS"


def held_bytes() -> int:
    """The memory of this process right now, of the :func:`kind` that this system has."""
    if _ROLLUP_PATH.exists():
        for line in _ROLLUP_PATH.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{_ROLLUP_PATH} has no Pss line")
    # resource.getrusage knows only the maximum so far, which no load call lowers again.
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
