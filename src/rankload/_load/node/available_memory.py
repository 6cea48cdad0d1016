"""Estimate how much memory this process may still take before the kernel evicts pages or kills it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the available bytes: the minimum over the machine and the control groups of this process.

    The result is None if the system does not tell. Page cache counts as available: proc(5) "MemAvailable", and
    ``inactive_file`` in a control group (Documentation/admin-guide/cgroup-v2.rst).

    Args:
        root: root of the filesystem, for tests.
    """
    found = [*_of_machine(root), *_of_control_groups(root)]
    return max(0, min(found)) if found else None


def _of_machine(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_control_groups(root: Path) -> Iterator[int]:
    """Yield the available bytes of each control group from this process's own up to the root; versions 1 and 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                names = ("memory.max", "memory.current", "inactive_file")
                yield from _of_group_and_above(root / "sys/fs/cgroup", group, names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _of_group_and_above(root / "sys/fs/cgroup/memory", group, names)


def _of_group_and_above(top: Path, group: str, names: tuple[str, str, str]) -> Iterator[int]:
    limit_name, usage_name, reclaimable_name = names
    directory = top / group.strip("/")
    for one in (directory, *directory.parents):
        with suppress(OSError, ValueError):  # no limit ("max"), or a group outside this cgroup namespace
            limit, usage = (int((one / name).read_text()) for name in (limit_name, usage_name))
            reclaimable = dict(line.split() for line in (one / "memory.stat").read_text().splitlines())
            yield limit - usage + int(reclaimable.get(reclaimable_name, 0))
        if one == top:
            return
