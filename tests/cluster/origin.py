"""An HTTP origin that writes down what it served: one JSON line when a response begins and one when it ends.

    python origin.py BIND_ADDRESS PORT DIRECTORY JOURNAL

`?rate=N` on a URL limits that response to N bytes a second, each connection for itself. It serves ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

CHUNK_BYTES = 64 * 1024


class Origin:
    """The test's side: puts files up, and reads what the server wrote down."""

    def __init__(self, base_url: str, directory: Path, journal_path: Path) -> None:
        self.base_url = base_url
        self.directory = directory
        self.journal_path = journal_path

    def publish(self, path: Path, label: str) -> str:
        """Serve the file under a name that carries its hash prefix, as torch.hub's names do; return the URL."""
        content = path.read_bytes()
        name = f"{label}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        (self.directory / name).write_bytes(content)
        return f"{self.base_url}/{name}"

    def requests(self, url: str, event: str = "begin") -> list[dict[str, Any]]:
        """The requests for `url` that began (or ended, for the event "end")."""
        text = self.journal_path.read_text() if self.journal_path.exists() else ""
        # A line without its newline is still being written.
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        name = urlsplit(url).path.lstrip("/")
        return [line for line in lines if line["name"] == name and line["event"] == event]

    def clients(self, url: str) -> list[str]:
        """The address behind each request for `url`, sorted."""
        return sorted(line["client"] for line in self.requests(url))

    def body_bytes(self, url: str, begun_after: float = 0) -> int:
        """The body bytes of all ended responses for `url`; on request those that began after a `time.monotonic()`."""
        return sum(line["body_bytes"] for line in self.requests(url, "end") if line["begun_at"] > begun_after)


def serve(bind_address: str, port: int, directory: Path, journal_path: Path) -> None:
    journal_lock = threading.Lock()

    def note(**line: object) -> None:
        with journal_lock, journal_path.open("a") as journal:
            journal.write(json.dumps(line) + "\n")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            url = urlsplit(self.path)
            name = url.path.lstrip("/")
            client, begun_at = self.client_address[0], time.monotonic()  # one clock for all processes here
            request = {"name": name, "client": client, "method": self.command, "begun_at": begun_at}
            note(event="begin", **request)
            sent = 0
            try:
                path = directory / name
                if "/" in name or not path.is_file():
                    self.send_error(404)
                    return
                size = path.stat().st_size
                etag = f'"{path.stat().st_mtime_ns:x}-{size:x}"'
                wanted = self._wanted_range(size, etag)
                first, last = wanted or (0, size - 1)
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(last - first + 1))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", etag)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                self.end_headers()
                rate = int(parse_qs(url.query).get("rate", ["0"])[0])
                started = time.monotonic()
                with path.open("rb") as body:
                    body.seek(first)
                    while with_body and (chunk := body.read(min(CHUNK_BYTES, last - first + 1 - sent))):
                        self.wfile.write(chunk)
                        sent += len(chunk)
                        if rate:
                            time.sleep(max(0.0, started + sent / rate - time.monotonic()))
            except OSError:
                self.close_connection = True  # the client left; the journal shows how far it came
            finally:
                note(event="end", body_bytes=sent, **request)

        def _wanted_range(self, size: int, etag: str) -> tuple[int, int] | None:
            """The first and the last byte of the one range asked for; None if the file is not If-Range's any more."""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if found is None or self.headers.get("If-Range", etag) != etag:
                return None
            return int(found[1]), min(int(found[2] or size - 1), size - 1)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server((bind_address, port), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
