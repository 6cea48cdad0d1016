"""Free ports that two test workers never both get."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

# Below the range from which the kernel gives ports to outgoing connections (32768 and up): nothing
# takes a port of ours between the moment we choose it and the moment somebody listens on it.
_FIRST, _LAST = 12000, 32000
_CLAIM = "rankload-test-port-{port}"


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port on which nothing listens and that no other reservation gets until the block ends."""
    while True:
        port = random.SystemRandom().randrange(_FIRST, _LAST)
        claim = socket.socket(socket.AF_UNIX)
        try:
            # An abstract name: the kernel drops it with the process, however that ends.
            claim.bind("\0" + _CLAIM.format(port=port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            claim.close()
            continue
        with claim:
            yield port
            return
