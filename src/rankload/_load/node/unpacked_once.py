"""Unpack an archive of one checkpoint once per node, into shared memory."""

from __future__ import annotations

from pathlib import Path

from rankload._coordination.call_context import CallContext
from rankload._formats.sniff import sniff
from rankload._formats.unpack import unpack, unpacked_size
from rankload._load.node.node_memory import NodeMemory
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._platform.scratch import descriptor_path

_NAME = "unpacked"


def with_unpacked(path: Path, call: CallContext) -> Path:
    """Return a path to a checkpoint that needs no unpacking. Collective over a node's ranks.

    The path is unchanged unless the file is torch.hub's legacy zip: an archive of one checkpoint. Then one rank of the
    node unpacks the archive into memory, which the others open. If that rank fails, they raise its error.

    Args:
        path: path of the file; all calling ranks of a node have the same file.
        call: context of the call. Its stack releases the memory; mappings stay.

    Raises:
        LoadError: the archive is damaged, or its member too large.
        RankloadError: the unpacking rank failed.
    """
    with wrap_load_errors(path):
        if sniff(path) != "single_member_zip":
            return path
        memory = NodeMemory.claim({_NAME: unpacked_size(path)}, call.channel, call.stack, purpose="unpacked")
        assert memory is not None
        descriptor = memory.descriptors[_NAME]
        if memory.is_received_here:
            with open(descriptor, "wb", closefd=False) as target:
                unpack(path, target, call.report_loading)
        memory.tell_or_wait(call.channel)
        return Path(descriptor_path(descriptor))
