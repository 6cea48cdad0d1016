"""How an origin answers: one frozen value for every way to be right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HTML_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in.</body></html>\n"

# What the server does with a Range header:
#   honest               206 with the range asked for, 416 beyond the end; If-Range respected
#   ignored              200 with everything, and no Accept-Ranges
#   shorter              206 that says, and has, only the first half of the range asked for
#   longer               206 that says, and has, everything from the start of the range on
#   shifted              206 that says what was asked for, with the bytes from one further on
#   wrong-start          206 whose Content-Range and bytes start elsewhere: at 0
#   wrong-total          206 whose Content-Range tells a total one byte longer
#   small-total          the same, the end of what it sends
#   unknown-total        206 whose Content-Range tells no total: "*"
#   no-content-range     206 without the header
#   refused              416 always
#   if-range-ignored     206 even though If-Range names another version
Ranges = Literal[
    "honest",
    "ignored",
    "shorter",
    "longer",
    "shifted",
    "wrong-start",
    "wrong-total",
    "small-total",
    "unknown-total",
    "no-content-range",
    "refused",
    "if-range-ignored",
]


@dataclass(frozen=True)
class Reply:
    """One answer. The defaults are a well-behaved static file server; fields combine freely.

    Attributes:
        status: An error status comes with a short text body unless ``body`` is given.
        body: Instead of the resource's content.
        headers: Set or, with ``None``, left out, whatever the rest says.
        redirect_to: Location; the status becomes 302 unless given.
        required_headers: Without these the answer is 401.
        content_length: ``False`` leaves it out (the end of the connection ends the body), a number lies.
        is_chunked: Transfer-Encoding: chunked.
        range_status: Requests for a range get this error, others the content.
        is_gzipped: Content-Encoding: gzip, whatever the client accepts.
        flip_byte_at: The byte at this offset of the content is not what it should be.
        truncate_at: The connection closes after so many body bytes.
        reset_at: The same, with a TCP reset.
        hold_at: The body stands still after so many bytes until ``Origin.release``.
        hold_before_reply: The same, before the status line.
        close_before_reply: The connection closes without a byte.
        bytes_per_second: Trickles.
        max_concurrent: While so many requests for the path run, the answer to one more is 429.
        expires_after_bytes: Once the path has sent so many body bytes over all requests, the answer is 403, as of a
            signed URL; replies that run go on.
    """

    status: int = 200
    body: bytes | None = None
    content_type: str | None = "application/octet-stream"
    headers: Mapping[str, str | None] = field(default_factory=dict)
    redirect_to: str | None = None
    required_headers: Mapping[str, str] = field(default_factory=dict)
    etag: str | bool = True
    last_modified: str | None = "Wed, 21 Oct 2015 07:28:00 GMT"
    content_length: int | bool = True
    is_chunked: bool = False
    is_gzipped: bool = False
    ranges: Ranges = "honest"
    range_status: int | None = None
    flip_byte_at: int | None = None
    truncate_at: int | None = None
    reset_at: int | None = None
    hold_at: int | None = None
    hold_before_reply: bool = False
    close_before_reply: bool = False
    bytes_per_second: float | None = None
    max_concurrent: int | None = None
    expires_after_bytes: int | None = None

    @classmethod
    def html_page(cls, status: int = 200) -> Reply:
        """The page of a login wall or a captive portal, where a file was asked for."""
        return cls(status=status, body=HTML_PAGE, content_type="text/html; charset=utf-8", ranges="ignored")

    @classmethod
    def busy(cls, retry_after: str | int, status: int = 429) -> Reply:
        """Too many requests (or 503): come back later, in seconds or at a date."""
        return cls(status=status, headers={"Retry-After": str(retry_after)})
