"""Choose the origin class for a URL."""

from __future__ import annotations

from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.http import HttpOrigin
from rankload._fetch.origins.origin import Origin
from rankload._settings import Settings
from rankload._urls import WEB_SCHEMES, Url


def origin_for(url: Url, headers: Headers, settings: Settings) -> Origin:
    """Return the origin for a URL.

    Args:
        url: URL of the file: http, https, or one of fsspec's schemes.
        headers: extra request headers for this URL; only HTTP uses them.
        settings: deadlines.
    """
    if url.scheme in WEB_SCHEMES:
        return HttpOrigin(url, headers, settings)
    # importing fsspec is slow
    from rankload._fetch.origins.filesystem import FilesystemOrigin
    from rankload._fetch.origins.hugging_face import HuggingFaceOrigin

    return HuggingFaceOrigin(url, headers, settings) if url.scheme == "hf" else FilesystemOrigin(url)
