"""Names on a mount of ``harness.fuse``: looked up, made, moved, removed, listed."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator

from harness import fuse_wire as wire
from harness.fuse_nodes import Key, Node, Nodes, OpenDirectory
from harness.fuse_vices import Vices
from harness.fuse_wire import Request


class Names:
    """Answers the requests about names; each method is named as its request, see ``fuse_filesystem``."""

    def __init__(self, nodes: Nodes, vices: Vices) -> None:
        self._nodes = nodes
        self._vices = vices
        self._seen: set[tuple[Key, bytes]] = set()  # what the lag hides no longer
        self._numbers = itertools.count(1)
        self._directories: dict[int, OpenDirectory] = {}

    def lookup(self, request: Request) -> bytes:
        parent, name = self._nodes[request.node], request.names[0]
        try:
            status = os.lstat(name, dir_fd=parent.descriptor)
            if self._is_hidden(parent, name, status):
                raise FileNotFoundError(errno.ENOENT, "hidden by the lag")
        except FileNotFoundError:
            if self._vices.negative_seconds:
                return wire.negative_reply(self._vices.negative_seconds)
            raise
        return self.entry(*self._nodes.find(parent, name))

    def entry(self, number: int, node: Node) -> bytes:
        return wire.entry_reply(number, node.status(), self._vices.entry_seconds, self._vices.attribute_seconds)

    def see(self, parent: Node, name: bytes) -> None:
        """Notes what was made through this mount: no lag hides it, nor the file that replaces it."""
        self._seen.add((parent.key, name))

    def _made(self, request: Request, parent: Node, name: bytes) -> bytes:
        number, node = self._nodes.find(parent, name)
        status = node.status()
        if (status.st_uid, status.st_gid) != (request.uid, request.gid):
            os.chown(name, request.uid, request.gid, dir_fd=parent.descriptor, follow_symlinks=False)
        self.see(parent, name)
        return self.entry(number, node)

    def _is_hidden(self, parent: Node, name: bytes, status: os.stat_result) -> bool:
        if not self._vices.lag_seconds:
            return False
        sight = (parent.key, name)
        if time.time() - status.st_ctime >= self._vices.lag_seconds:
            self._seen.add(sight)
        return sight not in self._seen

    def mknod(self, request: Request) -> bytes:
        parent, [name], (mode, device) = self._nodes[request.node], request.names, request.args
        os.mknod(name, mode, device, dir_fd=parent.descriptor)
        return self._made(request, parent, name)

    def mkdir(self, request: Request) -> bytes:
        parent, [name], [mode] = self._nodes[request.node], request.names, request.args
        os.mkdir(name, mode, dir_fd=parent.descriptor)
        return self._made(request, parent, name)

    def symlink(self, request: Request) -> bytes:
        parent, (name, target) = self._nodes[request.node], request.names
        os.symlink(target, name, dir_fd=parent.descriptor)
        return self._made(request, parent, name)

    def link(self, request: Request) -> bytes:
        parent, [name], source = self._nodes[request.node], request.names, self._nodes[request.args[0]]
        os.link(source.path, name, dst_dir_fd=parent.descriptor)
        self.see(parent, name)
        return self.entry(*self._nodes.find_open(source.descriptor))

    def unlink(self, request: Request) -> bytes:
        parent, [name] = self._nodes[request.node], request.names
        self._nodes.note_removal(parent, name)
        os.unlink(name, dir_fd=parent.descriptor)
        self._seen.discard((parent.key, name))
        return b""

    def rmdir(self, request: Request) -> bytes:
        os.rmdir(request.names[0], dir_fd=self._nodes[request.node].descriptor)
        return b""

    def rename(self, request: Request) -> bytes:
        parent, (old, new), new_parent = self._nodes[request.node], request.names, self._nodes[request.args[0]]
        self._nodes.note_removal(new_parent, new)
        os.rename(old, new, src_dir_fd=parent.descriptor, dst_dir_fd=new_parent.descriptor)
        self._seen.discard((parent.key, old))
        self.see(new_parent, new)
        return b""

    def readlink(self, request: Request) -> bytes:
        return os.readlink(b"", dir_fd=self._nodes[request.node].descriptor)

    def opendir(self, request: Request) -> bytes:
        number = next(self._numbers)
        self._directories[number] = OpenDirectory(self._nodes[request.node])
        return wire.open_reply(number)

    def readdir(self, request: Request) -> bytes:
        number, offset, size = request.args
        directory = self._directories[number]
        if offset == 0:
            directory.names = list(self._names(directory.node))
        payload = b""
        for index, (name, status) in enumerate(directory.names[offset:], start=offset + 1):
            entry = wire.dirent(status.st_ino, index, status.st_mode, name)
            if len(payload) + len(entry) > size:
                break
            payload += entry
        return payload

    def _names(self, node: Node) -> Iterator[tuple[bytes, os.stat_result]]:
        for name in (b".", b"..", *os.listdir(os.fsencode(node.path))):
            try:
                status = os.lstat(name, dir_fd=node.descriptor)
            except FileNotFoundError:
                continue  # removed since the listing
            if name in (b".", b"..") or not self._is_hidden(node, name, status):
                yield name, status

    def releasedir(self, request: Request) -> bytes:
        del self._directories[request.args[0]]
        return b""

    def fsyncdir(self, request: Request) -> bytes:
        descriptor = os.open(self._nodes[request.node].path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return b""
