"""Choose the origin class for a URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.http import HttpOrigin
from rankload._fetch.origins.origin import Origin
from rankload._settings import Settings


def origin_for(url: str, headers: Headers, settings: Settings) -> Origin:
    """Return the origin for a URL.

    Args:
        url: http, https, or a scheme of fsspec's.
        headers: extra request headers, meant for this URL; only HTTP has any.
        settings: deadlines.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return HttpOrigin(url, headers, settings)
    # fsspec takes a while to import
    from rankload._fetch.origins.filesystem import FilesystemOrigin
    from rankload._fetch.origins.hugging_face import HuggingFaceOrigin

    return HuggingFaceOrigin(url, headers, settings) if scheme == "hf" else FilesystemOrigin(url)
