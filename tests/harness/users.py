"""What a function under ``run_ranks`` does as another user, without root's rights."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

#: What is imported in the middle of a call: where Python itself lies in root's home, another user cannot.
_IMPORTED_LATE = (
    "encodings.ascii",
    "encodings.idna",
    "netrc",
    "rankload._cache.lease",
    "rankload._load.state_dict.read_checkpoint",
)

#: Users and a group that no machine has.
ALICE, BOB, GROUP = 71001, 71002, 71100


@contextlib.contextmanager
def acting_as(uid: int, groups: Sequence[int] = (), umask: int = 0o022) -> Iterator[None]:
    """Be ``uid``, of a group of the same number and of ``groups``, until the block ends. Needs root.

    All threads are, those that start in the block too. The effective ids change, which the kernel judges files by; the
    process itself stays root's, so that it can tell its test what happened.
    """
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    before, groups_before = os.umask(umask), os.getgroups()
    os.setgroups(list(groups))
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups_before)
        os.umask(before)


@contextlib.contextmanager
def public_directory(mode: int = 0o755, group: int = -1) -> Iterator[Path]:
    """A directory that every user can reach: ``tmp_path`` lies below one that is closed to others."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        os.chown(path, -1, group)
        path.chmod(mode)
        yield path
    finally:
        shutil.rmtree(path)
