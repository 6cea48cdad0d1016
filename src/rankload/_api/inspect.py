"""`open_checkpoint`: read a checkpoint's index without loading or downloading the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from rankload._api.tracebacks import short_tracebacks
from rankload._cache.files import check_has_scheme, wrap_read_errors
from rankload._fetch.checkpoint_table import find_checkpoint
from rankload._fetch.hub_names import HubFile, HubRepository
from rankload._fetch.offline import is_switched_off
from rankload._fetch.range_source import RemoteSource
from rankload._fetch.request import checked_headers, checked_urls
from rankload._formats.broken import BrokenFileError
from rankload._formats.hints import hint_on_directory
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.read_index import read_index
from rankload._formats.source import Source
from rankload._formats.unpack import open_unpacked
from rankload._load.checkpoint import Checkpoint
from rankload._settings import Settings
from rankload._text import printable
from rankload._urls import Url
from rankload.errors import CacheError, LoadError, OfflineError


@short_tracebacks
def open_checkpoint(url: str | os.PathLike[str], *, headers: Mapping[str, str] | None = None) -> Checkpoint:
    """Open a checkpoint to list its tensors, and to read single ones. Not collective.

    For a remote checkpoint, a few byte ranges are read, usually less than 1 MB in all. Nothing is cached, and the bytes
    are not verified against a digest. Nothing in the file is executed.

    Args:
        url: a path, or a URL as for `dist_load_state_dict_from_url`. The format is one of torch.save's (zip since
            torch 1.6, legacy before), safetensors, or Hugging Face's ``*.index.json`` of several such files, which are
            opened in place. A local file may also be torch.hub's archive of one checkpoint.
        headers: extra request headers.

    Returns:
        The checkpoint: a mapping from name to tensor, which reads a tensor when it is accessed. Use it as a context
        manager, or close it.

    Raises:
        LoadError: the file is broken, or its format has no index (TorchScript, compressed, tar).
        FetchError: the origin does not serve the bytes. It must support range requests.
        CacheError: the file cannot be read.
        OfflineError: offline mode is on (RANKLOAD_OFFLINE), and the checkpoint is not a local file.
    """
    if (named := find_checkpoint(url)) is not None:
        url = named.urls[0]
    location = Url.parse(_on_the_hub(os.fspath(url)))
    path = location.local_path
    display_name = location.display_name if path is None else printable(str(path))
    if path is not None:
        check_has_scheme(location.raw, path)
    stack = ExitStack()
    with ExitStack() as unless_opened:
        unless_opened.callback(stack.close)
        sources = _Sources(
            _remote_opener(location.raw, headers or {}) if path is None else _local_opener(path.parent), stack
        )
        name = urlsplit(location.raw).path.rpartition("/")[2] if path is None else path.name
        try:
            index = read_index(sources(name), name, sources, is_remote=path is None)
        except BrokenFileError as error:
            raise LoadError(f"{display_name}: {error}", path=display_name) from None
        except NotUnderstoodError as error:
            text = f"{display_name}: {error}: the file has no index that can be read without loading it"
            raise LoadError(text, path=display_name) from None
        unless_opened.pop_all()
    return Checkpoint(index, sources, stack, display_name)


def _on_the_hub(url: str) -> str:
    """Return the path of a file of the Hugging Face Hub in huggingface_hub's cache, else its URL.

    A repository stands for the weights in it. Any other URL is returned unchanged.
    """
    if not url.startswith("hf://"):
        return url
    from rankload._fetch.hub_layout import HubMemory, find_cached  # imports huggingface_hub
    from rankload._fetch.hub_weights import resolve_weights

    if (repository := HubRepository.parse(url)) is not None:
        settings = Settings.from_environment()
        is_offline = settings.offline or is_switched_off(Url.parse(url))
        url = resolve_weights(repository, HubMemory(is_kept=False), settings, offline=is_offline)
    file = HubFile.parse(url)
    path = find_cached(file) if file is not None else None
    return url if path is None else str(path)


class _Sources:
    """The files of a checkpoint by name. Each is opened once."""

    def __init__(self, open_one: Callable[[str, ExitStack], Source], stack: ExitStack) -> None:
        self._open_one, self._stack = open_one, stack
        self._opened: dict[str, Source] = {}

    def __call__(self, name: str) -> Source:
        if name not in self._opened:
            self._opened[name] = self._open_one(name, self._stack)
        return self._opened[name]


def _local_opener(directory: Path) -> Callable[[str, ExitStack], Source]:
    def open_one(name: str, stack: ExitStack) -> Source:
        path = directory / name
        if hint := hint_on_directory(path):
            text = f"cannot read {path}: it is no regular file{hint}"
            raise CacheError(text, path=str(path), errno=errno.EISDIR)
        with wrap_read_errors(path):
            return open_unpacked(path, stack)

    return open_one


def _remote_opener(url: str, headers: Mapping[str, str]) -> Callable[[str, ExitStack], Source]:
    settings, checked = Settings.from_environment(), checked_headers(headers)
    (first,) = checked_urls(url)
    if settings.offline or is_switched_off(first):
        raise OfflineError(
            f"{first}: offline mode is on, and this is not a local file; fetch it first, and open its path"
        )

    def open_one(name: str, stack: ExitStack) -> Source:
        is_first = name == urlsplit(first.raw).path.rpartition("/")[2]
        return stack.enter_context(RemoteSource(first if is_first else first.beside(name), checked, settings))

    return open_one
