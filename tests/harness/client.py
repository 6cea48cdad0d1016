"""The plainest HTTP client: what a server really sends, without redirects, retries, decoding or a cookie jar."""

from __future__ import annotations

import http.client
import ssl
from email.message import Message
from urllib.parse import urlsplit


def get(
    url: str, *, method: str = "GET", read: bool = True, trust: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, Message, bytes]:
    """One request on a connection of its own: (status, headers, body).

    Args:
        read: False closes the connection after the headers.
        headers: With ``_`` for ``-``.
    """
    parts = urlsplit(url)
    connection = (
        http.client.HTTPSConnection(parts.netloc, timeout=20, context=trust)
        if parts.scheme == "https"
        else http.client.HTTPConnection(parts.netloc, timeout=20)
    )
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read() if read else b""
    finally:
        connection.close()
