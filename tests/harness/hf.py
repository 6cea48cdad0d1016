"""A Hugging Face Hub made of an origin: the real client lists and downloads a repository of it.

    with Origin() as origin:
        repository = publish(origin, "org/tiny", {"model.safetensors": content, "config.json": b"{}"})
        run_script(client, repository.url("model.safetensors"), env=repository.environment)
        assert origin.completed_count(repository.blob("model.safetensors")) == 1

As on the real one, weights are redirected to a signed URL, on another host if ``cdn`` is another origin, and their
SHA-256 stands in the redirect's X-Linked-ETag; small text files come directly. What takes a POST is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from harness.origin import Origin, Reply

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "Expires=1&Signature=secret"
_TEXT_SUFFIXES = {".json", ".md", ".txt"}


@dataclass(frozen=True)
class Repository:
    """A repository of the origin, with the branch ``main`` at ``commit``.

    Attributes:
        files: Path -> content.
        token: What requests must bear; those for signed URLs must not.
        is_described: Whether the list of files has their sizes and digests, as the Hub's has and a proxy's may not.
    """

    origin: Origin
    cdn: Origin
    name: str
    files: Mapping[str, bytes]
    token: str | None
    commit: str = COMMIT
    is_described: bool = True

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables that lead huggingface_hub here."""
        return {
            "HF_ENDPOINT": self.origin.base_url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def url(self, path: str, revision: str = "main") -> str:
        """As the Hub's page shows it for a download."""
        return self.origin.url(self.resolved(path, revision))

    def fsspec_url(self, path: str) -> str:
        return f"hf://{self.name}/{path}"

    def resolved(self, path: str, revision: str = "main") -> str:
        """The name under which ``origin`` counts requests for a file."""
        return f"{self.name}/resolve/{revision}/{path}"

    def blob(self, path: str) -> str:
        """The name under which ``cdn`` has the content of a file that is redirected, for ``Origin.add`` with faults."""
        return f"blobs/{hashlib.sha256(self.files[path]).hexdigest()}"


def publish(
    origin: Origin,
    name: str,
    files: Mapping[str, bytes],
    *,
    token: str | None = None,
    cdn: Origin | None = None,
    missing: Iterable[str] = (),
    commit: str = COMMIT,
    is_described: bool = True,
) -> Repository:
    """Puts a model repository on the origin.

    Args:
        name: owner/name
        cdn: Where weights are redirected to.
        commit: What ``main`` is.
        is_described: Whether the list of files has their sizes and digests.
        missing: Paths for which the Hub says that the repository has no such file; others are just not found.
    """
    repository = Repository(origin, cdn or origin, name, files, token, commit, is_described)
    for revision in ("main", commit):
        _add_api(repository, revision)
        for path, content in files.items():
            _add_file(repository, revision, path, content)
        for path in missing:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            origin.add(repository.resolved(path, revision), b"", Reply(status=404, headers=headers))
    return repository


def _add_api(repository: Repository, revision: str) -> None:
    base = f"api/models/{repository.name}"
    for name in (base, f"{base}/revision/{revision}"):
        _add_json(repository, name, _model_info(repository))
    folders = {str(folder) for path in repository.files for folder in PurePosixPath(path).parents}
    for folder in folders:
        # All that lies below, as for recursive=True: the origin does not look at the query, and clients filter.
        below = [_folder_entry(inner) for inner in folders if inner != folder and _lies_in(inner, folder)]
        below += [_file_entry(*file) for file in repository.files.items() if _lies_in(file[0], folder)]
        _add_json(repository, f"{base}/tree/{revision}" + (f"/{folder}" if folder != "." else ""), below)


def _add_file(repository: Repository, revision: str, path: str, content: bytes) -> None:
    origin, cdn = repository.origin, repository.cdn
    headers = {"X-Repo-Commit": repository.commit}
    if _is_text(path):
        reply = Reply(headers=headers, etag=f'"{_git_oid(content)}"', required_headers=_required(repository))
        origin.add(repository.resolved(path, revision), content, reply)
        return
    location = cdn.add(repository.blob(path), content)
    linked = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
    reply = Reply(
        redirect_to=f"{location}?{SIGNATURE}", headers={**headers, **linked}, required_headers=_required(repository)
    )
    origin.add(repository.resolved(path, revision), b"", reply)


def _add_json(repository: Repository, name: str, value: Any) -> None:
    reply = Reply(content_type="application/json", required_headers=_required(repository))
    repository.origin.add(name, json.dumps(value).encode(), reply)


def _required(repository: Repository) -> dict[str, str]:
    return {} if repository.token is None else {"Authorization": f"Bearer {repository.token}"}


def _model_info(repository: Repository) -> dict[str, Any]:
    return {
        "_id": "1",
        "id": repository.name,
        "modelId": repository.name,
        "sha": repository.commit,
        "private": repository.token is not None,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [_sibling(path, content, repository) for path, content in repository.files.items()],
    }


def _sibling(path: str, content: bytes, repository: Repository) -> dict[str, Any]:
    """A file in the answer to ``?blobs=true``; the origin does not look at the query."""
    if not repository.is_described:
        return {"rfilename": path}
    sibling = {"rfilename": path, "size": len(content), "blobId": _git_oid(content)}
    if not _is_text(path):
        sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return sibling


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if not _is_text(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _lies_in(path: str, folder: str) -> bool:
    return PurePosixPath(folder) in PurePosixPath(path).parents


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_text(path: str) -> bool:
    return PurePosixPath(path).suffix in _TEXT_SUFFIXES
