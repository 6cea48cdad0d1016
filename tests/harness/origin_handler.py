"""The wire side of an origin: turns a ``Reply`` into bytes, and counts those that left."""

from __future__ import annotations

import gzip
import re
import select
import socket
import struct
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from harness.replies import Reply

if TYPE_CHECKING:
    from harness.origin import Origin
    from harness.origin_records import Request, Resource

_CHUNK_BYTES = 256 * 1024
_TRICKLE_SECONDS = 0.05


class Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.origin: Origin = self.server.origin  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request, resource, reply = self.origin.begin(self.command, unquote(urlsplit(path).path), query, headers)
        try:
            self._answer(request, resource, reply)
        except ConnectionError:
            self.close_connection = True  # the client went away; the counts say how far it got
        finally:
            self.origin.update(request, ended_at=time.monotonic())

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are kept, see ``Origin.requests``."""

    def _answer(self, request: Request, resource: Resource | None, reply: Reply) -> None:
        if reply.hold_before_reply:
            self.origin.hold(request)
        if reply.close_before_reply:
            self.close_connection = True
            return
        status, headers, body = _compose(request, resource, reply)
        # Noted before the first byte leaves: a client that has the answer finds it in the log.
        is_bodiless = self.command == "HEAD" or not body
        self.origin.update(request, status=status, is_complete=is_bodiless)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if headers.get("Connection") == "close":
            self.close_connection = True
        if self.command != "HEAD":
            self._send_body(request, reply, body)

    def _send_body(self, request: Request, reply: Reply, body: memoryview) -> None:
        stops = sorted(
            {len(body)} | {at for at in (reply.hold_at, reply.truncate_at, reply.reset_at) if at is not None}
        )
        sent = 0
        for stop in stops:
            sent = self._send_until(request, reply, body, sent, min(stop, len(body)))
            if stop == reply.hold_at:
                self.origin.hold(request)
            if stop == reply.reset_at:
                # Before the client can know, and come again while this request seems to run.
                self.origin.update(request, ended_at=time.monotonic())
                # Lingering for 0 s: close sends a reset, and what is unsent is dropped.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if stop == reply.truncate_at:
                self.close_connection = True
                return
        if reply.is_chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def _send_until(self, request: Request, reply: Reply, body: memoryview, begin: int, end: int) -> int:
        size = _CHUNK_BYTES
        if reply.bytes_per_second is not None:
            size = max(1, int(reply.bytes_per_second * _TRICKLE_SECONDS))
        while begin < end:
            piece = body[begin : min(begin + size, end)]
            if reply.is_chunked:
                head = b"%x\r\n" % len(piece)
                self._send_counted(
                    request, begin, len(body), head + piece + b"\r\n", range(len(head), len(head) + len(piece))
                )
            else:
                self._send_counted(request, begin, len(body), piece, range(len(piece)))
            begin += len(piece)
            if reply.bytes_per_second is not None:
                self.origin.pause(len(piece) / reply.bytes_per_second)
        return begin

    def _send_counted(
        self, request: Request, before: int, total: int, frame: bytes | memoryview, payload: range
    ) -> None:
        """Sends ``frame``; those of its bytes that are ``payload`` count as body."""
        view = memoryview(frame)
        sent = 0
        poll = select.poll()
        poll.register(self.connection, select.POLLOUT)
        while sent < len(view):
            poll.poll()
            # Sent and counted in one step: whoever has a byte finds it counted, and the other way round.
            with self.origin.changing():
                try:
                    sent += self.connection.send(view[sent:], socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                request.body_bytes_sent = before + min(max(sent - payload.start, 0), len(payload))
                request.is_complete = request.body_bytes_sent == total


def _compose(request: Request, resource: Resource | None, reply: Reply) -> tuple[int, dict[str, str], memoryview]:
    """Status, headers and the body as it should be sent in full."""
    headers: dict[str, str | None] = {"Content-Type": reply.content_type}
    status, body = _choose_body(request, resource, reply, headers)
    if reply.is_gzipped:
        body = memoryview(gzip.compress(body))
        headers["Content-Encoding"] = "gzip"
    if reply.is_chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif reply.content_length is True:
        headers["Content-Length"] = str(len(body))
    else:
        # Its end is the body's end; and after a wrong length no client finds the next reply.
        headers["Connection"] = "close"
        if reply.content_length is not False:
            headers["Content-Length"] = str(reply.content_length)
    headers.update(reply.headers)
    return status, {name: value for name, value in headers.items() if value is not None}, body


def _choose_body(
    request: Request, resource: Resource | None, reply: Reply, headers: dict[str, str | None]
) -> tuple[int, memoryview]:
    if any(request.headers.get(name.lower()) != value for name, value in reply.required_headers.items()):
        headers["WWW-Authenticate"] = "Bearer"
        return 401, _error_text(401)
    if reply.range_status is not None and "range" in request.headers:
        headers["Content-Type"] = "text/plain"
        return reply.range_status, _error_text(reply.range_status)
    if reply.redirect_to is not None:
        headers["Location"] = reply.redirect_to
        return (302 if reply.status == 200 else reply.status), memoryview(b"")
    if reply.body is not None:
        return reply.status, memoryview(reply.body)
    if reply.status >= 400 or resource is None:
        headers["Content-Type"] = "text/plain"
        return reply.status, _error_text(reply.status)
    etag = resource.etag if reply.etag is True else reply.etag or None
    headers["ETag"] = etag
    headers["Last-Modified"] = reply.last_modified
    content = resource.content
    if reply.flip_byte_at is not None:
        damaged = bytearray(content)
        damaged[reply.flip_byte_at] ^= 0xFF
        content = memoryview(damaged)
    return _select_range(request, reply, content, etag, headers)


def _select_range(
    request: Request, reply: Reply, content: memoryview, etag: str | None, headers: dict[str, str | None]
) -> tuple[int, memoryview]:
    total = len(content)
    if reply.ranges == "ignored":
        return reply.status, content
    headers["Accept-Ranges"] = "bytes"
    asked = _parse_range(request.headers.get("range", ""), total)
    validator = request.headers.get("if-range")
    is_current = validator is None or validator in (etag, reply.last_modified)
    if asked is None or not (is_current or reply.ranges == "if-range-ignored"):
        return reply.status, content
    begin, end = asked
    if reply.ranges == "refused" or begin >= end:
        headers["Content-Range"] = f"bytes */{total}"
        return 416, _error_text(416)
    if reply.ranges == "shorter":
        end = begin + max(1, (end - begin) // 2)
    if reply.ranges == "longer":
        end = total
    told_total: int | str = total
    if reply.ranges == "wrong-start":
        begin = 0
    if reply.ranges == "wrong-total":
        told_total = total + 1
    if reply.ranges == "small-total":
        told_total = end
    if reply.ranges == "unknown-total":
        told_total = "*"
    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{told_total}"
    if reply.ranges == "no-content-range":
        headers["Content-Range"] = None
    if reply.ranges == "shifted":
        return 206, memoryview(bytes(content[begin + 1 : end]) + bytes(content[:1]))
    return 206, content[begin:end]


def _parse_range(header: str, total: int) -> tuple[int, int] | None:
    """Half-open byte range; empty when it lies beyond the end; ``None`` without a single byte range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if not first:
        return max(0, total - int(last)), total
    return int(first), min(total, int(last) + 1) if last else total


def _error_text(status: int) -> memoryview:
    return memoryview(f"{status} {HTTPStatus(status).phrase}\n".encode())
