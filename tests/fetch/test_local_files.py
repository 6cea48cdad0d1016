"""``file://`` URLs and plain paths: used in place, never copied, and verified like any other."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import errors_of, expect, fetch, files_in, load
from harness.ranks import run_ranks


@pytest.fixture
def local(tmp_path, checkpoint) -> Path:
    path = tmp_path / "source folder" / checkpoint.name
    path.parent.mkdir()
    return Path(shutil.copy(checkpoint.path, path))


@pytest.mark.parametrize("form", [str, Path, Path.as_uri])
def test_used_in_place(local, cache, checkpoint, form):
    results = run_ranks(load, 2, args=(form(local), cache), kwargs={"check_hash": True})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert files_in(local.parent) == [local.name]
    assert files_in(cache) == [] if cache.exists() else True


def test_every_rank_gets_the_path(local, cache):
    results = run_ranks(fetch, 2, args=(local.as_uri(), cache))
    assert {result.value for result in results} == {str(local)}


def test_tilde(local, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(local.parent))
    assert rankload.dist_fetch(f"~/{local.name}", cache) == local


def test_relative_path(local, cache, monkeypatch):
    monkeypatch.chdir(local.parent)
    assert rankload.dist_fetch(local.name, cache) == local


def test_percent_in_a_plain_path_is_a_percent(tmp_path, cache):
    path = tmp_path / "100%25 of.bin"
    path.write_bytes(b"content")
    assert rankload.dist_fetch(path, cache) == path
    assert rankload.dist_fetch(path.as_uri(), cache) == path


def test_wrong_sha256(local, cache):
    errors = errors_of(load, str(local), cache, sha256="0" * 64)
    expect(errors, rankload.errors.DigestMismatchError, str(local), "invalid hash value")
    assert local.exists()


def test_wrong_hash_prefix(local, cache):
    renamed = local.rename(local.with_name("model-0badc0de.pth"))
    expect(errors_of(load, str(renamed), cache, check_hash=True), rankload.errors.DigestMismatchError, "0badc0de")


def test_truncated(local, cache):
    os.truncate(local, local.stat().st_size - 10)
    expect(errors_of(load, str(local), cache), rankload.errors.NotACheckpointError, str(local))


def test_missing(tmp_path, cache):
    path = tmp_path / "none.pth"
    errors = errors_of(load, str(path), cache)
    expect(errors, rankload.CacheError, f"cannot read {path}", "No such file")
    assert isinstance(errors[0], OSError)


def test_directory(tmp_path, cache):
    with pytest.raises(rankload.CacheError, match="no regular file"):
        rankload.dist_fetch(tmp_path, cache)


def test_directories_have_hints(tmp_path, cache):
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/model.safetensors.index.json").write_text("{}")
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed/.metadata").write_bytes(b"")
    for call in (lambda path: rankload.dist_fetch(path, cache), rankload.load, rankload.open_checkpoint):
        with pytest.raises(rankload.CacheError, match=r"name the file in it, such as model\.safetensors\.index\.json"):
            call(tmp_path / "sharded")
        with pytest.raises(rankload.CacheError, match=r"load it with torch\.distributed\.checkpoint"):
            call(tmp_path / "distributed")


@pytest.mark.parametrize("location", ["example.invalid/models/model.pth", "localhost:8000/model.pth"])
def test_url_without_a_scheme(cache, location):
    for call in (lambda path: rankload.dist_fetch(path, cache), rankload.load, rankload.open_checkpoint):
        with pytest.raises(rankload.errors.MissingFileError, match="if a URL is meant, write https://") as caught:
            call(f"{location}?sig=SECRET")
        assert "SECRET" not in f"{caught.value} {caught.value.__cause__!r} {caught.value.__context__!r}"
    error = errors_of(fetch, f"{location}?sig=SECRET", cache)[0]
    assert "SECRET" not in f"{error} {error.fields} {error.__cause__!r} {error.__context__!r}"
    with pytest.raises(rankload.errors.MissingFileError) as caught:
        rankload.dist_fetch(f"/nowhere/{location}", cache)
    assert "URL" not in str(caught.value)


def test_path_of_a_url(cache):
    with pytest.raises(rankload.ArgumentError, match="pass a string"):
        rankload.dist_fetch(Path("https://example.invalid/model.pth"), cache)


def test_names_that_are_not_utf_8(origin, tmp_path, checkpoint):
    content, cache = checkpoint.path.read_bytes(), tmp_path / os.fsdecode(b"\xfe")
    path = tmp_path / os.fsdecode(b"mod\xe8le.pth")
    path.write_bytes(content)
    assert rankload.dist_fetch(path, cache) == path
    assert digest_of(rankload.load(path)) == digest_of(checkpoint.content)
    assert digest_of(rankload.dist_load_state_dict_from_url(path)) == digest_of(checkpoint.content)
    url, name = origin.add("model.pth", checkpoint.path), os.fsdecode(b"\xff.pth")
    for _ in range(2):
        assert rankload.dist_fetch(url, cache, file_name=name).read_bytes() == content
    assert origin.bytes_sent() == len(content)
    results = run_ranks(load, 2, args=(url, cache), kwargs={"file_name": name})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user that nobody knows")
def test_without_a_home_directory(origin, checkpoint):
    """As in a container: a local file needs no cache, and a URL wants to be told where."""
    code = """
import os, sys, torch, rankload, rankload._api.state_dict
import rankload._load.state_dict.read_checkpoint, rankload._load.node.node_copy
os.setgroups([]); os.setgid(54321); os.setuid(54321)
assert len(rankload.dist_load_state_dict_from_url(sys.argv[1]))
try:
    rankload.dist_fetch(sys.argv[2])
except rankload.CacheError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TORCH_HOME")}
    environment["XDG_CACHE_HOME"] = "~/cache"
    url = origin.add("model.pth", checkpoint.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(checkpoint.path, folder))
        path.parent.chmod(0o755)
        command = [sys.executable, "-c", code, str(path), url]
        ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "no home directory" in ran.stdout and "pass model_dir=, or set TORCH_HOME" in ran.stdout
    assert origin.request_count() == 0


def test_pipe_is_refused_instead_of_waited_for(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(rankload.CacheError, match="no regular file"):
        rankload.dist_fetch(tmp_path / "pipe", cache)


def test_tilde_in_model_dir(origin, tmp_path, monkeypatch):
    """torch.hub makes a directory named ``~`` of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = rankload.dist_fetch(origin.add("file.bin", b"content"), "~/cache")
    assert path == tmp_path / "cache" / "file.bin"


def test_default_directory_is_torch_hubs(origin, monkeypatch, tmp_path):
    import torch.hub

    url = origin.add("file.bin", b"content")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    assert rankload.dist_fetch(url).parent == Path(torch.hub.get_dir()) / "checkpoints"
    assert rankload.dist_fetch(url).parent == tmp_path / "torch home" / "hub" / "checkpoints"


@pytest.mark.parametrize("as_url", [False, True])
def test_sidecar_vouches(tmp_path, as_url):
    path, sidecar = tmp_path / "file.bin", tmp_path / "file.bin.sha256"
    path.write_bytes(b"content")
    location = path.as_uri() if as_url else path
    with pytest.raises(rankload.errors.MissingFileError, match=str(sidecar)):
        rankload.dist_fetch(location, sidecar=True)
    sidecar.write_text(f"{'0' * 64}  file.bin\n")
    with pytest.raises(rankload.errors.DigestMismatchError, match=r"\(sidecar\)"):
        rankload.dist_fetch(location, sidecar=True)
    sidecar.write_text(f"{hashlib.sha256(b'content').hexdigest()}  file.bin\n")
    assert rankload.dist_fetch(location, sidecar=True) == path
