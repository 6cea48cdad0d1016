"""fsspec's callers get files from rankload's cache: ``fsspec.open("rankload::https://host/x.ckpt")``.

The protocol is registered by an entry point, so nothing need be imported. Any URL that rankload fetches may follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from typing_extensions import override

from rankload._api.fetch import fetch_for_job
from rankload._settings import Settings
from rankload._urls import redact


class RankloadFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """One file at a URL: fetched once per job, verified, and kept as by `rankload.hub`. Read-only. Not collective.

    Args:
        fo: the URL, which fsspec passes for what follows ``rankload::``.
        target_protocol: scheme of the URL, which fsspec passes.
        target_options: options of the other filesystem, which are refused: rankload takes credentials from where its
            documentation says.
        model_dir: cache directory; default: as in `rankload.dist_fetch`.
        refresh: ask the origin whether the cached file is still current.
        sha256: expected digest of the file.

    Raises:
        TypeError: ``target_options`` are given.
    """

    protocol = "rankload"
    local_file = True  # fsspec.open_local takes the name of what `_open` returns
    cachable = False

    def __init__(
        self,
        fo: str = "",
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        *,
        model_dir: str | None = None,
        refresh: bool = False,
        sha256: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if target_options:
            names = ", ".join(target_options)
            raise TypeError(f"rankload::{target_protocol}: takes no options of that filesystem: {names}")
        self._url, self._model_dir, self._refresh, self._sha256 = fo, model_dir, refresh, sha256

    @override
    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        if mode != "rb":
            raise ValueError(f"{redact(self._url)}: URLs can be read, not written (mode {mode!r})")
        return self._fetched().open("rb")

    @override
    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size in bytes and type of the file, which is fetched for that."""
        return {"name": path, "size": self._fetched().stat().st_size, "type": "file"}

    @override
    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return the one file."""
        return [self.info(path)] if detail else [path]

    def _fetched(self) -> Path:
        return fetch_for_job(
            self._url,
            self._model_dir,
            Settings.from_environment(),
            must_be_checkpoint=False,
            refresh=self._refresh,
            sha256=self._sha256,
        ).path
