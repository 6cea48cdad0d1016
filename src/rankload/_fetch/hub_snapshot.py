"""A snapshot of a repository, by huggingface_hub's own downloader, in its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankload._fetch.hub_names import check_endpoint
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._fetch.origins.http_errors import raise_alone
from rankload._settings import Settings
from rankload._urls import redact_text
from rankload.errors import NetworkError, OfflineError


def download_snapshot(repo_id: str, revision: str | None, directory: Path, settings: Settings, **options: Any) -> Path:
    """Download a snapshot, or find it in the cache, and return its directory, whose name is the commit.

    Raises:
        ArgumentError: ``HF_ENDPOINT`` is no URL.
        OfflineError: offline mode is on, and the snapshot is not in the cache.
        FetchError: the Hub does not serve it.
    """
    display_name = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
    check_endpoint()
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        is_offline = settings.offline or constants.HF_HUB_OFFLINE
        try:
            found = snapshot_download(
                repo_id, revision=revision, cache_dir=directory, local_files_only=is_offline, **options
            )
        except LocalEntryNotFoundError as error:
            if not is_offline:  # huggingface_hub's word for a Hub that does not answer
                raise_alone(NetworkError(f"{display_name}: {redact_text(str(error))}", url=display_name))
            text = f"{display_name}: offline mode is on, and the cache lacks it: {error}"
            raise_alone(OfflineError(text, url=display_name))
    return Path(found)
