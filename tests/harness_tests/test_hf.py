"""The real huggingface_hub takes our origin for a Hub."""

import hashlib

import pytest

from harness.client import get
from harness.hf import COMMIT, SIGNATURE, publish
from harness.origin import Origin
from harness.scripts import run_script

CONTENT = bytes(range(256)) * 1000
FILES = {"model.safetensors": CONTENT, "config.json": b'{"a": 1}', "folder/other.bin": CONTENT[::-1]}


@pytest.fixture
def cdn():
    with Origin() as server:
        yield server


CLIENT = """
import hashlib, sys
from pathlib import Path
import huggingface_hub as hub
print(hub.HfApi().model_info("org/tiny").sha)
folder = Path(hub.snapshot_download("org/tiny"))
for path in sorted(folder.rglob("*.*")):
    print(path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_the_client_downloads_a_repository(origin, cdn, tmp_path):
    repository = publish(origin, "org/tiny", FILES, cdn=cdn)
    result = run_script(CLIENT, env={**repository.environment, "HF_HOME": str(tmp_path)}).check()
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    assert result.stdout.splitlines() == [COMMIT, *(f"{path} {digests[path]}" for path in sorted(FILES))]
    assert [cdn.completed_count(repository.blob(path)) for path in ("model.safetensors", "folder/other.bin")] == [1, 1]


THROUGH_FSSPEC = """
import fsspec, hashlib, sys
for url in sys.argv[1:]:
    filesystem, path = fsspec.url_to_fs(url)
    info = filesystem.info(path)
    print(info["size"], (info.get("lfs") or {}).get("sha256"), filesystem.cat_file(path, start=3, end=5).hex())
print(sorted(filesystem.find("org/tiny")))
"""


def test_through_fsspec_with_a_token(origin, cdn, tmp_path):
    repository = publish(origin, "org/tiny", FILES, cdn=cdn, token="hf_token")
    urls = [repository.fsspec_url(path) for path in FILES]
    result = run_script(THROUGH_FSSPEC, *urls, env={**repository.environment, "HF_HOME": str(tmp_path)}).check()
    assert result.stdout.splitlines() == [
        f"{len(CONTENT)} {hashlib.sha256(CONTENT).hexdigest()} 0304",
        f"8 None {FILES['config.json'][3:5].hex()}",
        f"{len(CONTENT)} {hashlib.sha256(FILES['folder/other.bin']).hexdigest()} fcfb",
        str(sorted(f"org/tiny/{path}" for path in FILES)),
    ]
    assert {request.headers["authorization"] for request in origin.requests()} == {"Bearer hf_token"}
    assert not any("authorization" in request.headers for request in cdn.requests())


def test_without_the_token(origin, tmp_path):
    repository = publish(origin, "org/tiny", FILES, token="hf_token")
    environment = {**repository.environment, "HF_TOKEN": None, "HF_HOME": str(tmp_path)}
    assert "401 Unauthorized" in run_script(CLIENT, env=environment).stderr


def test_a_plain_client_sees_the_redirect_and_its_headers(origin, cdn):
    repository = publish(origin, "org/tiny", FILES, cdn=cdn)
    status, headers, _ = get(repository.url("model.safetensors"))
    assert status == 302
    assert headers["Location"] == f"{cdn.url(repository.blob('model.safetensors'))}?{SIGNATURE}"
    assert headers["X-Linked-ETag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert headers["X-Linked-Size"] == str(len(CONTENT))
    assert headers["X-Repo-Commit"] == COMMIT
    assert get(headers["Location"], Range="bytes=3-4")[2] == CONTENT[3:5]
    assert get(repository.url("config.json", COMMIT))[2] == FILES["config.json"]
