"""`load` and `dist_hub_load`: what an entry point downloads is once per job, like the repository itself."""

from __future__ import annotations

import functools
from typing import Any

from rankload._api import hub_load
from rankload._patch.patch import patch


@functools.wraps(hub_load.load)
def load(*args: Any, **kwargs: Any) -> Any:
    """Call `hub_load.load` with the patch in force."""
    with patch():
        return hub_load.load(*args, **kwargs)


@functools.wraps(hub_load.dist_hub_load)
def dist_hub_load(*args: Any, **kwargs: Any) -> Any:
    """Call `hub_load.dist_hub_load` with the patch in force."""
    with patch():
        return hub_load.dist_hub_load(*args, **kwargs)
