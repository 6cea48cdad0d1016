"""A rank that takes itself for one on another machine: another kernel, so another page cache and other processes.

What tells machines apart is the kernel's boot id. There is one kernel here, so files, memory and the network stay
common, and a rank that wrongly made use of that would go unnoticed where the boot id is all that differs: it is what
rankload goes by. The disk is one, too, and stands for a file server's. Real nodes are in ``cluster.lab``.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from harness import mounts

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def become_node(number: int, directory: Path) -> None:
    """Moves this process to node ``number``; all ranks of a test that name the same directory agree on what that is.

    Args:
        directory: for a file of this module's.
    """
    from rankload._fetch import cache_domain

    cache_domain.is_node_local = lambda directory: False  # the machine's own disk stands for a file server
    mounts.isolate()
    boot_id = directory / f"boot-id-{number}-{os.getpid()}"  # nobody reads a file that another is just writing
    boot_id.write_text(f"{uuid.uuid5(uuid.NAMESPACE_OID, f'{directory}-{number}')}\n")
    mounts.mount(str(boot_id), _BOOT_ID, "none", mounts.MS_BIND)
