"""What the tests of mounts share."""

import contextlib
import errno
import os

from harness import fuse


@contextlib.contextmanager
def node_paths(directory, count=1, **vices):
    """The paths under which so many nodes see ``directory / "server"``."""
    with fuse.nodes(directory, count, **vices) as nodes:
        yield [node.path for node in nodes]


def errno_of(function, *args):
    """The name of the errno with which the call fails; empty if it succeeds."""
    try:
        function(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


def opened(stack, path, flags=os.O_RDWR | os.O_CREAT):
    """A descriptor that is closed with ``stack``."""
    descriptor = os.open(path, flags, 0o644)
    stack.callback(os.close, descriptor)
    return descriptor
