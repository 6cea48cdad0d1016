"""The files that the kernel knows of a mount, and the open ones among them."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from dataclasses import dataclass, field

from harness.fuse_wire import ROOT_ID

Key = tuple[int, int]


@dataclass
class Node:
    """A file that the kernel refers to by number, held so that it stays the same file whatever becomes of its name.

    Attributes:
        descriptor: From open(O_PATH).
        lookups: How often the kernel was told of it, and has not forgotten it since.
    """

    descriptor: int
    key: Key
    lookups: int = 0

    @property
    def path(self) -> str:
        """Leads to this very file, under whatever name or none."""
        return f"/proc/self/fd/{self.descriptor}"

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor)


@dataclass
class OpenFile:
    """An open file of the mount.

    Attributes:
        is_dirty: Has been written to since the last fsync or close.
    """

    descriptor: int
    node: Node
    is_dirty: bool = False


@dataclass
class OpenDirectory:
    """An open directory, with the names that it had when it was last read from its start."""

    node: Node
    names: list[tuple[bytes, os.stat_result]] = field(default_factory=list)


class Nodes:
    """Numbers for files. A number is not given twice, so an old one never means a new file."""

    def __init__(self, root: str) -> None:
        self._numbers = itertools.count(ROOT_ID + 1)
        self._by_key: dict[Key, int] = {}
        self._nodes = {ROOT_ID: _open_node(root)}
        self._by_key[self._nodes[ROOT_ID].key] = ROOT_ID
        self._removed_here: set[Key] = set()

    def __getitem__(self, number: int) -> Node:
        return self._nodes[number]

    def find(self, parent: Node, name: bytes) -> tuple[int, Node]:
        """What ``name`` is, and its number, for which the kernel now counts one lookup more."""
        return self._count(_open_node(name, os.O_NOFOLLOW, parent.descriptor))

    def find_open(self, descriptor: int) -> tuple[int, Node]:
        """The same for an open file, whose name may have gone already."""
        return self._count(_open_node(f"/proc/self/fd/{descriptor}"))

    def _count(self, node: Node) -> tuple[int, Node]:
        number = self._by_key.get(node.key)
        if number is None:
            number = self._by_key[node.key] = next(self._numbers)
            self._nodes[number] = node
            self._removed_here.discard(node.key)  # an earlier file's, whose inode number it has got
        else:
            os.close(node.descriptor)
            node = self._nodes[number]
        node.lookups += 1
        return number, node

    def forget(self, number: int, lookups: int) -> None:
        node = self._nodes.get(number)
        if node is None or number == ROOT_ID:
            return
        node.lookups -= lookups
        if node.lookups <= 0:
            del self._nodes[number], self._by_key[node.key]
            os.close(node.descriptor)

    def note_removal(self, parent: Node, name: bytes) -> None:
        """Remembers that this mount is about to remove what ``name`` is, if anything."""
        with contextlib.suppress(FileNotFoundError):
            self._removed_here.add(key_of(os.lstat(name, dir_fd=parent.descriptor)))

    def is_removed_elsewhere(self, node: Node) -> bool:
        return node.status().st_nlink == 0 and node.key not in self._removed_here


def key_of(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino


def used_bytes(directory: str) -> int:
    """The sizes of all files under ``directory``, each counted once."""
    sizes: dict[Key, int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue  # removed by another mount since the listing
            if stat.S_ISREG(status.st_mode):
                sizes[key_of(status)] = status.st_size
    return sum(sizes.values())


def _open_node(name: str | bytes, flags: int = 0, parent: int | None = None) -> Node:
    descriptor = os.open(name, os.O_PATH | flags, dir_fd=parent)
    return Node(descriptor, key_of(os.fstat(descriptor)))
