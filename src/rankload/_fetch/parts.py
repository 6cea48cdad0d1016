"""A checkpoint in several files: its index, and then all that the index names, as one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rankload._cache.failures import reading
from rankload._checkpoint.broken import BrokenFileError
from rankload._checkpoint.sharded import has_weight_map, part_names
from rankload._checkpoint.source import LocalSource
from rankload._errors import CacheError, NotACheckpointError
from rankload._types import FetchedFile, FetchRequest
from rankload._urls import beside, local_path_of

#: Fetches one file.
FetchOne = Callable[[FetchRequest], FetchedFile]

#: How such an index is usually called (huggingface_hub, "split_torch_state_dict"). What is one, its content says.
INDEX_SUFFIX = ".index.json"


def with_parts(index: FetchedFile, request: FetchRequest, fetch_one: FetchOne) -> FetchedFile:
    """Return the file with the sizes of its parts, which are fetched beside it; a file that is no index as it is.

    Args:
        index: fetched and verified.
        request: what it was fetched by. Its digest is the index's alone; each part is checked by its own structure,
            and by what its own server says of it.
        fetch_one: fetches one file.

    Raises:
        NotACheckpointError: the index names files that are not beside it.
        CacheError: another file has the name of a part.
        RankloadError: a part cannot be fetched.
    """
    sizes = []
    for name in _part_names(index.path):
        part = fetch_one(_request_for(name, index, request))
        if part.path != index.path.parent / name:
            raise CacheError(
                f"{index.path.parent / name} is another URL's, and the parts of {index.path.name} have to lie beside "
                "it: pass file_name= with a folder of its own",
                path=str(index.path.parent / name),
            )
        sizes.append(part.size_bytes)
    return replace(index, part_sizes=tuple(sizes))


def files_of(file: FetchedFile) -> list[tuple[Path, int]]:
    """Return all files of a fetched one with their sizes in bytes: itself, and its parts."""
    names = _part_names(file.path) if file.part_sizes else []
    parts = [(file.path.parent / name, size) for name, size in zip(names, file.part_sizes, strict=True)]
    return [(file.path, file.size_bytes), *parts]


def _part_names(path: Path) -> list[str]:
    with reading(path), path.open("rb", buffering=0) as file:
        source = LocalSource(file.fileno())
        try:
            return part_names(source) if has_weight_map(source) else []
        except BrokenFileError as error:
            raise NotACheckpointError(f"{path}: {error}", path=str(path)) from error


def _request_for(name: str, index: FetchedFile, request: FetchRequest) -> FetchRequest:
    if local_path_of(request.urls[0]) is not None:
        urls: tuple[str, ...] = (str(index.path.parent / name),)
    else:
        urls = tuple(beside(url, name) for url in request.urls)
    return replace(
        request,
        urls=urls,
        directory=index.path.parent,
        file_name=name,
        sha256=None,
        sha256_source="sha256",
        hash_prefix=None,
        must_be_checkpoint=True,
    )
