"""The demo's origin: a small HTTP server on loopback that serves one file and counts what it served."""

import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

# Small against the rate, so that downloads that share the link progress evenly.
_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Served:
    """What an origin served: how many requests, and how many bytes of their bodies it handed to sockets."""

    requests: int
    body_bytes: int


class Origin:
    """Serves one file at :attr:`url` while its ``with`` block lasts.

    Args:
        path: The file. Its name is the last part of the URL.
        bytes_per_second: What all downloads together get, as over one uplink; ``None`` for no limit.
    """

    def __init__(self, path: Path, bytes_per_second: float | None = None) -> None:
        self._path = path
        self._pace = _Pace(bytes_per_second)
        self._lock = threading.Lock()
        self._requests = 0
        self._body_bytes = 0
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="origin")

    @property
    def url(self) -> str:
        """Where the file is, on a port that was free."""
        return f"http://127.0.0.1:{self._server.server_port}/{quote(self._path.name)}"

    @property
    def served(self) -> Served:
        """The counts so far; final once the ``with`` block has ended."""
        with self._lock:
            return Served(self._requests, self._body_bytes)

    def __enter__(self) -> "Origin":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        # Joins the handlers too: a client can have its last byte before its handler has counted it.
        self._server.server_close()

    def answers(self, path: str) -> bool:
        """Whether this request path means the file; counts the request either way."""
        with self._lock:
            self._requests += 1
        return path.partition("?")[0] == "/" + quote(self._path.name)

    def headers(self) -> dict[str, str]:
        """The headers that describe the file; the ETag is a validator as nginx makes it, not a digest."""
        status = self._path.stat()
        return {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(status.st_size),
            "ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
        }

    def send_body(self, socket_file: BufferedIOBase) -> None:
        """Writes the file at the origin's pace, counting what the socket took."""
        with self._path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                self._pace.wait_for_turn(len(chunk))
                socket_file.write(chunk)
                with self._lock:
                    self._body_bytes += len(chunk)


class _Server(ThreadingHTTPServer):
    # Handlers are joined at the end, so that their counts are final then.
    daemon_threads = False

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: a client that goes away reports that itself."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # A client that stops reading must not keep the origin from closing.
    timeout = 60

    def do_GET(self) -> None:
        if self._send_head():
            self.server.origin.send_body(self.wfile)

    def do_HEAD(self) -> None:
        self._send_head()

    def _send_head(self) -> bool:
        """Sends status and headers; whether a body may follow."""
        self.close_connection = True
        if not self.server.origin.answers(self.path):
            self.send_error(HTTPStatus.NOT_FOUND)
            return False
        self.send_response(HTTPStatus.OK)
        for name, value in {**self.server.origin.headers(), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        return True

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent: the counts are the log."""


class _Pace:
    """Gives each chunk its turn on a link of a fixed rate that all connections share."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait_for_turn(self, size_bytes: int) -> None:
        if self._bytes_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._free_at)
            self._free_at = turn + size_bytes / self._bytes_per_second
        time.sleep(turn - now)
