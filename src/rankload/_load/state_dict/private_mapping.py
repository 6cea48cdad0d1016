"""Make torch.load map files with MAP_PRIVATE, whatever default the user has set.

With ``torch.serialization.set_default_mmap_options(MAP_SHARED)``, every in-place update of a loaded tensor would be
written into the cached file, for all ranks and all later runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from mmap import MAP_PRIVATE

from torch.serialization import get_default_mmap_options, set_default_mmap_options

#: torch keeps the option per process, or per thread from 2.13 on. A per-process option allows only one mapped load at a
#: time: otherwise one thread could restore the user's value while another is in torch.load.
_one_load = threading.RLock()


def _renew_lock() -> None:
    global _one_load  # noqa: PLW0603  # the thread that held the old lock does not exist in the forked child
    _one_load = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def torch_maps_privately() -> Iterator[None]:
    """Set torch's option for the duration of a torch.load, then restore the user's value."""
    with _one_load:
        if get_default_mmap_options() == MAP_PRIVATE:
            yield
        else:
            with set_default_mmap_options(MAP_PRIVATE):
                yield
