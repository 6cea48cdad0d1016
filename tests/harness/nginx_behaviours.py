"""What an nginx of ``harness.nginx`` can be told to do: pieces of its configuration, which combine freely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Behaviour:
    """Lines of configuration.

    Attributes:
        server: In the server's block; locations, too.
        http: Outside it: maps, zones.
        files: Name -> text, written beside the configuration, where relative names are looked up.
    """

    server: str = ""
    http: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


def rate(bytes_per_second: int) -> Behaviour:
    """Limits each request, and so each connection."""
    return Behaviour(f"limit_rate {bytes_per_second};")


def no_ranges() -> Behaviour:
    """Answers 200 with everything to a Range header, and sends no Accept-Ranges."""
    return Behaviour("max_ranges 0;")


def password(user: str, secret: str) -> Behaviour:
    """Basic authentication: 401 without."""
    return Behaviour(
        "auth_basic realm; auth_basic_user_file passwords;", files={"passwords": f"{user}:{{PLAIN}}{secret}\n"}
    )


def busy_at_first(count: int, *, status: int = 503, retry_after: str | int = 0) -> Behaviour:
    """Answers ``status`` with Retry-After to the first requests, each of which must come on its own connection.

    nginx counts connections, not requests: it closes the connection after such an answer, and a connection
    without a request counts, too.
    """
    busy = "".join(f"{number} 1; " for number in range(1, count + 1))
    return Behaviour(
        f"if ($is_early) {{ return {status}; }} {_busy('early', status, retry_after)}",
        http=f"map $connection $is_early {{ {busy}}}",
    )


def busy_share(percent: float, *, status: int = 503, retry_after: str | int = 0) -> Behaviour:
    """Answers ``status`` with Retry-After to a random share of the requests."""
    return Behaviour(
        f"if ($is_unlucky) {{ return {status}; }} {_busy('unlucky', status, retry_after)}",
        http=f'split_clients $request_id $is_unlucky {{ {percent:g}% 1; * ""; }}',
    )


def at_most(count: int, *, status: int = 429, retry_after: str | int = 0) -> Behaviour:
    """Answers ``status`` with Retry-After to requests for a file of which ``count`` already run."""
    return Behaviour(
        f"limit_conn files {count}; limit_conn_status {status}; {_busy('crowded', status, retry_after)}",
        http="limit_conn_zone $uri zone=files:1m;",
    )


def redirect_to(base_url: str, *, status: int = 302) -> Behaviour:
    """Sends every request to the same path and query on another server."""
    return Behaviour(f"return {status} {base_url}$request_uri;")


def gzip_if_accepted() -> Behaviour:
    """Compresses as it sends: a weak ETag, no Content-Length, no ranges; for clients that accept gzip."""
    return Behaviour("gzip on; gzip_types *; gzip_min_length 0; gzip_http_version 1.0;")


def gzip_always() -> Behaviour:
    """Sends the file ``NAME.gz`` for ``NAME`` with Content-Encoding: gzip, whatever the client accepts."""
    return Behaviour("gzip_static always;")


def _busy(name: str, status: int, retry_after: str | int) -> str:
    return (
        f"error_page {status} @{name};"
        f'location @{name} {{ keepalive_timeout 0; add_header Retry-After "{retry_after}" always; return {status}; }}'
    )
