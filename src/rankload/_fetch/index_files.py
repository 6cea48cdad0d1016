"""A checkpoint in several files: its index, and then all that the index names, as one unit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rankload._cache.files import wrap_read_errors
from rankload._cache.layout import fitting
from rankload._fetch.models import FetchRequest
from rankload._formats.broken import BrokenFileError
from rankload._formats.sharded import has_weight_map, is_plain_name, part_names
from rankload._formats.source import LocalSource, open_regular
from rankload._types import FetchedFile
from rankload._urls import Url
from rankload.errors import CacheError, NotACheckpointError

#: Fetches one file.
FetchOne = Callable[[FetchRequest], FetchedFile]

#: How an index is called (huggingface_hub, "split_torch_state_dict"), also with a variant's name (diffusers,
#: ``….index.fp16.json``). An index from an origin is believed to be one only under such a name: the caller has asked
#: for it then, and it lies in a folder of its own.
_INDEX_NAME = re.compile(r"(?P<stem>.+)\.index(\.[A-Za-z0-9_-]+)?\.json", re.DOTALL)


def is_index_name(name: str) -> bool:
    """Return whether a file name is that of an index."""
    return _INDEX_NAME.fullmatch(name) is not None


def name_in_own_folder(name: str, key: str) -> str:
    """Return the name of an index in a folder that is its URL's alone: names of indexes and parts are common.

    Args:
        name: a relative path.
        key: of the URL.
    """
    path = PurePosixPath(name)
    match = _INDEX_NAME.fullmatch(path.name)
    return str(path.parent / f"{fitting(match['stem'] if match else path.name, 238)}-{key[:16]}" / path.name)


def name_without_folder(name: str) -> str:
    """Return what `name_in_own_folder` was given."""
    path = PurePosixPath(name)
    return str(path.parent.parent / path.name)


def check_index(path: Path, request: FetchRequest, display_name: str) -> None:
    """Check a file that an origin has sent, if it is an index: where it lies, and what it calls its parts.

    Args:
        path: the file; one that is no index passes.
        request: what it was fetched by.
        display_name: where it is, for messages.

    Raises:
        NotACheckpointError: an origin would choose which files beside it are read or written.
    """
    names = _part_names(path)
    if names is None:
        return
    if not request.is_index:
        if not request.must_be_checkpoint:
            return  # a file like any other: nobody looks for its parts
        raise NotACheckpointError(
            f"{display_name}: the index of a checkpoint in several files, under a name that does not say so: refused; "
            "if it is meant, pass file_name='….index.json', so that its parts get a folder of their own",
            path=str(path),
        )
    if strange := [name for name in names if not is_plain_name(name)]:
        raise NotACheckpointError(
            f"{display_name}: index of a checkpoint with a part called {strange[0][:80]!r}: refused; expected file "
            "names of letters, digits and _.+=- that lie beside the index",
            path=str(path),
        )
    # on some filesystems these are one file (names are ASCII by now)
    seen = {PurePosixPath(request.file_name).name.lower()}
    for name in names:
        if name.lower() in seen:
            raise NotACheckpointError(
                f"{display_name}: index of a checkpoint with a part called {name!r}: refused; another of its files has "
                "this name, but for upper and lower case",
                path=str(path),
            )
        seen.add(name.lower())


def with_parts(index: FetchedFile, request: FetchRequest, fetch_one: FetchOne) -> FetchedFile:
    """Return the file with the sizes of its parts, which are fetched beside it; a file that is no index as it is.

    Args:
        index: fetched and verified.
        request: what it was fetched by. Its digest is the index's alone; each part is checked by its own structure,
            and by what its own server says of it.
        fetch_one: fetches one file.

    Raises:
        NotACheckpointError: see `check_index`.
        CacheError: another file has the name of a part.
        RankloadError: a part cannot be fetched.
    """
    is_local = request.url.local_path is not None
    if not is_local:
        check_index(index.path, request, str(index.path))
    if not is_local and not request.is_index:
        return index
    sizes, digests, are_published = [], [], index.is_published
    for name in _part_names(index.path) or ():
        part = fetch_one(_request_for(name, index, request))
        if part.path != index.path.parent / name:
            raise CacheError(
                f"{index.path.parent / name} is not what its index names, and rankload did not put it there: the parts "
                f"of {index.path.name} have to lie beside it; remove that file",
                path=str(index.path.parent / name),
            )
        sizes.append(part.size_bytes)
        digests.append(part.sha256)
        are_published = are_published and part.is_published
    known = [digest for digest in digests if digest is not None]
    parts_sha256 = digest_of_parts(known) if len(known) == len(digests) else None
    return replace(index, part_sizes=tuple(sizes), parts_sha256=parts_sha256, is_published=are_published)


def digest_of_parts(digests: list[str]) -> str | None:
    """Return one digest for the parts of an index, of theirs in the order of their names; None without parts."""
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def files_of(file: FetchedFile) -> list[tuple[Path, int]]:
    """Return all files of a fetched one with their sizes in bytes: itself, and its parts."""
    names = (_part_names(file.path) or ()) if file.part_sizes else ()
    parts = [(file.path.parent / name, size) for name, size in zip(names, file.part_sizes, strict=True)]
    return [(file.path, file.size_bytes), *parts]


def _part_names(path: Path) -> list[str] | None:
    """Return the names of an index' parts; None for a file that is no index."""
    with wrap_read_errors(path), open_regular(path) as file:
        source = LocalSource(file.fileno())
        try:
            return part_names(source) if has_weight_map(source) else None
        except BrokenFileError as error:
            raise NotACheckpointError(f"{path}: {error}", path=str(path)) from error


def _request_for(name: str, index: FetchedFile, request: FetchRequest) -> FetchRequest:
    if request.url.local_path is not None:
        urls: tuple[Url, ...] = (Url.parse(str(index.path.parent / name)),)
    else:
        urls = tuple(url.beside(name) for url in request.urls)
    return replace(
        request,
        urls=urls,
        directory=index.path.parent,
        file_name=name,
        sha256=None,
        sha256_source="sha256",
        hash_prefix=None,
        must_be_checkpoint=True,
        is_index=False,
        is_part=True,
    )
