"""`load_pretrained`: a named checkpoint into a module, on every rank."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rankload._api.module import dist_load_into
from rankload._api.tracebacks import short_tracebacks
from rankload._fetch.checkpoint_table import named_in
from rankload._load.report import LoadReport

if TYPE_CHECKING:
    from torch import nn


@short_tracebacks
def load_pretrained(
    module: nn.Module, name: str, *, table: str | os.PathLike[str] | None = None, **options: Any
) -> LoadReport:
    """Load a named checkpoint into a module on every rank: the digest in the table vouches for it.

    **Collective**, like `dist_load_into`, which also takes names, but from these tables only: the file that
    ``RANKLOAD_TABLE`` names, or else ``rankload.toml`` in the working directory, and those of installed packages (entry
    point group ``rankload.checkpoints``).

    Args:
        module: the module to load into.
        name: name in a table. Without ``table``, a URL or a path is taken, too.
        table: path of a TOML table; the same content on all ranks. See "Named checkpoints" in the documentation.
        **options: further arguments of `dist_load_into`: ``strict``, ``model_dir``, ``adapt`` (after the table's), …

    Returns:
        The report of `dist_load_into`.

    Raises:
        ArgumentError: the table has no such name, or is malformed.
        VerificationError: the file is not the one for which the table has a digest: it has changed at its origin.
        RankloadError: any other error of `dist_load_into`.
    """
    checkpoint: Any = name if table is None else named_in(table, name)
    return dist_load_into(module, checkpoint, **options)
