"""iopath's PathManager (detectron2, fvcore, pycls, SlowFast) gets URLs from rankload's cache."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from iopath.common.file_io import PathHandler, PathManager

from rankload._api.fetch import fetch_for_job
from rankload._settings import Settings
from rankload._urls import redact


class RankloadHandler(PathHandler):  # type: ignore[misc]  # iopath is untyped
    """A handler for http and https URLs: a file is fetched once per job, verified, and kept as by `rankload.hub`.

    Not collective.

    Args:
        model_dir: cache directory; default: as in `rankload.dist_fetch`.
    """

    def __init__(self, model_dir: str | None = None) -> None:
        self._model_dir = model_dir

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://"]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        settings = Settings.from_environment()
        return str(fetch_for_job(path, self._model_dir, settings, must_be_checkpoint=False, refresh=force).path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise ValueError(f"{redact(path)}: URLs can be read, not written (mode {mode!r})")
        return Path(self._get_local_path(path)).open(mode, buffering)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._isfile(path)

    def _isfile(self, path: str, **_: Any) -> bool:
        try:
            return bool(self._get_local_path(path))
        except OSError:
            return False


def register(manager: PathManager, model_dir: str | None = None) -> None:
    """Let a path manager get URLs from rankload. Replaces iopath's own handler of http and https URLs.

    Args:
        manager: the library's manager, such as ``fvcore.common.file_io.PathManager``.
        model_dir: cache directory; default: as in `rankload.dist_fetch`.
    """
    manager.register_handler(RankloadHandler(model_dir), allow_override=True)
