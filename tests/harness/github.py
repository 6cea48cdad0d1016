"""GitHub in a network of a test's own: repositories, their archives and branches, release files, over TLS.

with github(tmp_path) as hub:
    hub.publish("owner/name", {"hubconf.py": "..."})
    hub.run(script).check()
    assert hub.requests("codeload.github.com") == [...]
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import ssl
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

HOSTS = ("github.com", "api.github.com", "codeload.github.com", "download.pytorch.org")


class GitHub:
    """What the server serves, and what it was asked for.

    Attributes:
        network: the namespace in which the hosts are this server.
        environment: variables that make a client trust it.
    """

    def __init__(self, network, directory: Path, environment: Mapping[str, str]) -> None:
        self.network, self.environment = network, environment
        self._directory = directory

    def publish(
        self, name: str, files: Mapping[str, str], *, ref: str = "main", tag: bool = False, ambiguous: bool = False
    ) -> None:
        """Put a branch or tag of a repository up, or a new state of it; an ambiguous one is both."""
        path = self._directory / f"{name.replace('/', '__')}.json"
        state = json.loads(path.read_text()) if path.exists() else {"branches": {}, "tags": {}, "ambiguous": []}
        kinds = ["branches", "tags"] if ambiguous else ["tags" if tag else "branches"]
        archive = _archive(f"{name.replace('/', '-')}-0123abc", files)
        for kind in kinds:
            state[kind][ref] = hashlib.sha1(archive).hexdigest()
        if ambiguous:
            state["ambiguous"].append(ref)
        (self._directory / _archive_name(name, ref)).write_bytes(archive)
        path.write_text(json.dumps(state))

    def replace_archive(self, name: str, content: bytes, ref: str = "main") -> None:
        """Let the archive of a branch be something else."""
        (self._directory / _archive_name(name, ref)).write_bytes(content)

    def add_file(self, path: str, content: bytes, *, host: str = "github.com") -> str:
        """Put a release file up, or a file of another host, and return its URL."""
        (self._directory / _file_name(host, path)).write_bytes(content)
        return f"https://{host}/{path}"

    def require_token(self, token: str) -> None:
        """Answer 401 to requests that bear another token."""
        (self._directory / "token").write_text(token)

    def requests(self, host: str | None = None) -> list[str]:
        """Host and path of each request, in order; or only the paths, of one host."""
        found = [json.loads(line) for line in (self._directory / "journal").read_text().splitlines()]
        return [
            f"{line['host']}{line['path']}" if host is None else line["path"]
            for line in found
            if host in (None, line["host"])
        ]

    def run(self, *argv, env: Mapping[str, str | None] | None = None, timeout_seconds: float = 120):
        """Run a command in the network to its end."""
        return self.network.run_program(list(argv), timeout_seconds, env={**self.environment, **(env or {})})


@contextlib.contextmanager
def github(directory: Path) -> Iterator[GitHub]:
    """Make the network and the server; needs root."""
    from harness.certificates import Authority
    from harness.namespace import namespace
    from harness.waiting import wait_until

    served = directory / "github"
    served.mkdir(parents=True)
    (served / "journal").touch()
    authority = Authority(directory)
    certificate = authority.certificate(*HOSTS)
    with (
        namespace(dict.fromkeys((*HOSTS, socket.gethostname()), "127.0.0.1")) as network,  # torchrun's own name, too
        network.start_program([sys.executable, Path(__file__), served, certificate.chain, certificate.key]) as server,
    ):
        wait_until(lambda: "ready" in server.stdout, 30, lambda: f"GitHub does not start: {server.stderr}")
        yield GitHub(network, served, authority.environment)


def _archive(top: str, files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{top}/", "")  # ZipFile.mkdir came with Python 3.11
        for name, text in files.items():
            archive.writestr(f"{top}/{name}", text)
    return buffer.getvalue()


def _file_name(host: str, path: str) -> str:
    return f"file-{hashlib.sha256(f'{host}/{path}'.encode()).hexdigest()}"


def _archive_name(name: str, ref: str) -> str:
    return f"archive-{hashlib.sha256(f'{name}:{ref}'.encode()).hexdigest()}"


def _serve(directory: Path, chain: str, key: str) -> None:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            host, url = self.headers["Host"], urlsplit(self.path)
            with lock, (directory / "journal").open("a") as journal:
                journal.write(json.dumps({"host": host, "path": url.path}) + "\n")
            token = directory / "token"
            if token.exists() and (given := self.headers["Authorization"]) and given.split()[-1] != token.read_text():
                self._answer(401, b"bad credentials")
            elif host == "api.github.com":
                self._answer_api(url.path, parse_qs(url.query))
            else:
                self._answer_page(url.path)

        def _answer_api(self, path: str, query: dict[str, list[str]]) -> None:
            _, owner, name, kind = path.strip("/").split("/")
            if not (state := self._state(owner, name)):
                self._answer(404, b'{"message": "Not Found"}')
                return
            found = state[kind]
            entries = [{"name": ref, "commit": {"sha": sha}} for ref, sha in found.items()]
            page, size = int(query["page"][0]), int(query["per_page"][0])
            self._answer(200, json.dumps(entries[(page - 1) * size : page * size]).encode())

        def _answer_page(self, path: str) -> None:
            owner, name, kind, ref = [*path.strip("/").split("/", 3), "", "", ""][:4]
            state, ref = self._state(owner, name), ref.strip("/")
            file = directory / _file_name(self.headers["Host"], path.strip("/"))
            archive = directory / _archive_name(f"{owner}/{name}", ref.removeprefix("refs/heads/"))
            if file.exists():
                self._answer(200, file.read_bytes())
            elif kind == "tree" and ref in state.get("branches", {}):
                self._answer(200, b"<html>" + bytes(100_000))
            elif kind == "zipball" and ref in state.get("ambiguous", []):
                self._answer(300, b"ambiguous")
            elif kind == "zipball" and archive.exists():
                self._answer(302, b"", {"Location": f"https://codeload.github.com/{owner}/{name}/legacy.zip/{ref}"})
            elif kind == "legacy.zip" and archive.exists():
                self._answer(200, archive.read_bytes(), {"Content-Type": "application/zip"})
            else:
                self._answer(404, b"Not Found")

        def _state(self, owner: str, name: str) -> dict:
            path = directory / f"{owner}__{name}.json"
            return json.loads(path.read_text()) if path.exists() else {}

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):  # a client may read the status alone
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with Server(("127.0.0.1", 443), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
