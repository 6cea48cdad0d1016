"""A checkpoint in several files: fetch the index and all files that it names, as one unit."""

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

#: File name of an index (huggingface_hub, "split_torch_state_dict"), optionally with a variant (diffusers,
#: ``….index.fp16.json``). A fetched file counts as an index only under such a name: then the caller has asked for an
#: index, and it has its own folder.
_INDEX_NAME = re.compile(r"(?P<stem>.+)\.index(\.[A-Za-z0-9_-]+)?\.json", re.DOTALL)


def is_index_name(name: str) -> bool:
    """Return whether a file name is that of an index."""
    return _INDEX_NAME.fullmatch(name) is not None


def name_in_own_folder(name: str, key: str) -> str:
    """Return the path of an index in a folder for its URL only, because names of indexes and parts are common.

    Args:
        name: relative path of the index.
        key: key of the URL.
    """
    path = PurePosixPath(name)
    match = _INDEX_NAME.fullmatch(path.name)
    return str(path.parent / f"{fitting(match['stem'] if match else path.name, 238)}-{key[:16]}" / path.name)


def name_without_folder(name: str) -> str:
    """Return the path that was passed to `name_in_own_folder`."""
    path = PurePosixPath(name)
    return str(path.parent.parent / path.name)


def check_index(path: Path, request: FetchRequest, display_name: str) -> None:
    """If a fetched file is an index, check its place in the cache, and the names of its parts.

    Args:
        path: path of the file. A file that is not an index passes.
        request: request that fetched the file.
        display_name: URL or path of the file, for messages.

    Raises:
        NotACheckpointError: the index would let an origin choose which other files are read or written.
    """
    names = _part_names(path)
    if names is None:
        return
    if not request.is_index:
        if not request.must_be_checkpoint:
            return  # an ordinary file: its parts are not fetched
        raise NotACheckpointError(
            f"{display_name}: this is the index of a checkpoint in several files, but its name is not that of an "
            "index: refused; if you want it, pass file_name='….index.json', so that its parts get their own folder",
            path=str(path),
        )
    if strange := [name for name in names if not is_plain_name(name)]:
        raise NotACheckpointError(
            f"{display_name}: index of a checkpoint with a part called {strange[0][:80]!r}: refused; expected plain "
            "file names of letters, digits and _.+=-",
            path=str(path),
        )
    # on some filesystems, names that differ only in case are one file (names are ASCII by now)
    seen = {PurePosixPath(request.file_name).name.lower()}
    for name in names:
        if name.lower() in seen:
            raise NotACheckpointError(
                f"{display_name}: index of a checkpoint with a part called {name!r}: refused; another of its files has "
                "the same name, except for upper and lower case",
                path=str(path),
            )
        seen.add(name.lower())


def with_parts(index: FetchedFile, request: FetchRequest, fetch_one: FetchOne) -> FetchedFile:
    """Fetch the parts that an index names, beside the index. A file that is not an index is returned unchanged.

    Args:
        index: fetched and verified file.
        request: request that fetched the file. Its digest is only the index's. Each part is checked by its structure,
            and by its own digest: the request's, and the one that its server gives.
        fetch_one: fetches one file.

    Returns:
        The index with the sizes and digests of its parts.

    Raises:
        NotACheckpointError: the index is refused (see `check_index`).
        CacheError: another file has the name of a part.
        RankloadError: a part cannot be fetched.
    """
    is_local = request.url.local_path is not None
    if not is_local:
        check_index(index.path, request, str(index.path))
    if not is_local and not request.is_index:
        return index
    sizes, digests, are_published, source = [], [], index.is_published, index.source
    for name in _part_names(index.path) or ():
        part = fetch_one(_request_for(name, index, request))
        if part.path != index.path.parent / name:
            raise CacheError(
                f"{index.path.parent / name} is not the part that {index.path.name} names, and rankload did not put it "
                "there; the part must have this path: remove that file",
                path=str(index.path.parent / name),
            )
        sizes.append(part.size_bytes)
        digests.append(part.sha256)
        are_published = are_published and part.is_published
        source = "download" if part.source == "download" else source
    known = [digest for digest in digests if digest is not None]
    parts_sha256 = digest_of_parts(known) if len(known) == len(digests) else None
    return replace(index, part_sizes=tuple(sizes), parts_sha256=parts_sha256, is_published=are_published, source=source)


def digest_of_parts(digests: list[str]) -> str | None:
    """Return one digest of the digests of all parts, in the order of the parts' names; None without parts."""
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def files_of(file: FetchedFile) -> list[tuple[Path, int]]:
    """Return a fetched file and its parts, each with its size in bytes."""
    names = (_part_names(file.path) or ()) if file.part_sizes else ()
    parts = [(file.path.parent / name, size) for name, size in zip(names, file.part_sizes, strict=True)]
    return [(file.path, file.size_bytes), *parts]


def _part_names(path: Path) -> list[str] | None:
    """Return the names of an index's parts; None for a file that is not an index."""
    with wrap_read_errors(path), open_regular(path) as file:
        source = LocalSource(file.fileno())
        try:
            return part_names(source) if has_weight_map(source) else None
        except BrokenFileError as error:
            raise NotACheckpointError(f"{path}: {error}", path=str(path)) from error


def _request_for(name: str, index: FetchedFile, request: FetchRequest) -> FetchRequest:
    hub_file = None
    if request.url.local_path is not None:
        urls: tuple[Url, ...] = (Url.parse(str(index.path.parent / name)),)
    elif request.hub_file is not None:
        commit = index.path.relative_to(request.directory).parts[1]  # snapshots/<commit>/…
        hub_file = request.hub_file.beside(name, commit)
        urls = (Url.parse(hub_file.url),)
    else:
        urls = tuple(url.beside(name) for url in request.urls)
    return replace(
        request,
        urls=urls,
        directory=request.directory if hub_file else index.path.parent,
        file_name=name,
        hub_file=hub_file,
        sha256=dict(request.named.part_digests).get(name) if request.named else None,
        sha256_source="sha256",
        hash_prefix=None,
        must_be_checkpoint=True,
        is_index=False,
        is_part=True,
    )
