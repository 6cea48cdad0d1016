"""torch.distributed.checkpoint reads ordinary checkpoints: safetensors and torch.save's files, local or from a URL.

::

    import torch.distributed.checkpoint as dcp
    from rankload.integrations.dcp import StorageReader

    state_dict = {"weight": …}  # DTensors of a fully_shard module, say
    dcp.load(state_dict, storage_reader=StorageReader("https://host/model.safetensors.index.json"))
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from typing_extensions import Unpack, override

from rankload._api.fetch import fetch_for_job
from rankload._fetch.request import RequestOptions, UrlArgument
from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError, Unbuilt
from rankload._formats.read_index import read_index
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import Region
from rankload._load.values.tensors import torch_dtype
from rankload._load.values.torch_values import built
from rankload._settings import Settings
from rankload.errors import LoadError


class StorageReader(storage.StorageReader):
    """A storage reader for `torch.distributed.checkpoint.load`. Each rank reads the bytes of its own shards only.

    A remote checkpoint is fetched into the cache first, once per job, as by `rankload.hub.load_state_dict_from_url`;
    a local one is read in place. Not collective: dcp.load shares errors between the ranks.

    Args:
        url: a path, or a URL and its mirrors: a safetensors file, a file of torch.save, or an index of several.
        model_dir: cache directory; default: as in `rankload.dist_load_state_dict_from_url`.
        **options: more of its arguments: ``sha256``, ``headers``, ``check_hash``, ``refresh``, …
    """

    def __init__(
        self, url: UrlArgument, model_dir: str | os.PathLike[str] | None = None, **options: Unpack[RequestOptions]
    ) -> None:
        self._url, self._model_dir, self._options = url, model_dir, options
        self._tensors: dict[str, FileTensor] = {}
        self._values: dict[str, Any] = {}
        self._stack = ExitStack()

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load: of ``checkpoint_id``, a path or URL, if one is given."""
        if checkpoint_id is not None:
            self._url = checkpoint_id
        self._stack.close()
        self._tensors, self._values = {}, {}

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Fetch the checkpoint if need be, and read its index.

        Raises:
            RankloadError: as `rankload.hub.load_state_dict_from_url` and `rankload.open_checkpoint`.
        """
        path = fetch_for_job(self._url, self._model_dir, Settings.from_environment(), **self._options).path
        files = CheckpointFiles(path, self._stack)
        try:
            index = read_index(files.source(path.name), path.name, files.source, is_remote=False)
        except (BrokenFileError, NotUnderstoodError) as error:
            raise LoadError(f"{files.display_name}: {error}: dcp.load needs an index", path=str(path)) from None
        for name, entry in index.tensors.items():
            order = index.byte_orders[entry.file]
            self._tensors[name] = FileTensor(entry, files, order, [], files.display_name)
        values = ((name, built(value)) for name, value in index.remainder.items())
        self._values = {name: value for name, value in values if not isinstance(value, Unbuilt)}
        described: dict[str, Any] = {name: _described(tensor) for name, tensor in self._tensors.items()}
        described.update(dict.fromkeys(self._values, BytesStorageMetadata()))
        places = {MetadataIndex(name, torch.Size([0] * tensor.dim())): name for name, tensor in self._tensors.items()}
        return Metadata(described, storage_data=places)

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: every rank has read the index."""

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan: each rank reads its own part."""
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part, in the order of the files.

        Raises:
            LoadError: a file ended early.
            CacheError: a file cannot be read.
        """
        try:
            for item in self._in_order(plan.items):
                name = item.storage_index.fqn
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _saved(self._values[name]))
                    continue
                target = planner.resolve_tensor(item).detach()
                region = Region(tuple(item.storage_offsets), tuple(item.lengths))
                self._tensors[name].reader(target, region)()
                planner.commit_tensor(item, target)
        finally:
            self._stack.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return True: a path or URL is checked when it is read."""
        return True

    def _in_order(self, items: list[ReadItem]) -> Iterator[ReadItem]:
        def place(item: ReadItem) -> tuple[str, int]:
            tensor = self._tensors.get(item.storage_index.fqn)
            return ("", 0) if tensor is None else tensor.position

        return iter(sorted(items, key=place))


def _described(tensor: FileTensor) -> TensorStorageMetadata:
    zeros = torch.Size([0] * tensor.dim())
    dtype = torch_dtype(tensor.entry, tensor.files.display_name)
    chunk = ChunkStorageMetadata(zeros, tensor.shape)
    return TensorStorageMetadata(TensorProperties(dtype), tensor.shape, [chunk])


def _saved(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream
