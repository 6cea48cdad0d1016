"""Without network: hits work, misses fail at once and say how to prefetch, and no socket is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import errors_of, expect, load
from harness.ranks import run_ranks
from harness.scripts import run_script
from rankload import hub

#: Fails where a socket is made, by anybody, at the level of the interpreter's audit events.
NO_SOCKETS = """
import sys
def forbid(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise AssertionError(f"{event}{arguments}")
sys.addaudithook(forbid)
"""


def printed_command(error: str) -> str:
    return error[error.index("rankload prefetch ") :].partition(" [rank ")[0]


def test_hit(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    results = run_ranks(load, 2, args=(url, cache), kwargs={"offline": True})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


@pytest.mark.fault(50)
@pytest.mark.parametrize("file_name", [None, "my $model's.pth"])
def test_miss_names_the_command_that_helps(origin, cache, checkpoint, file_name):
    url = origin.add("model.pth", checkpoint.path)
    errors = errors_of(load, url, cache, offline=True, file_name=file_name)
    expect(errors, rankload.errors.OfflineError, url, str(cache), "not in the cache", "run: rankload prefetch")
    assert origin.request_count() == 0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as with the environment activated
    command = printed_command(str(errors[0]))
    subprocess.run(command, shell=True, check=True, timeout=60, env={**os.environ, "PATH": path})
    assert origin.request_count() == 1
    results = run_ranks(load, 2, args=(url, cache), kwargs={"offline": True, "file_name": file_name})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}


def test_miss_of_a_signed_url_says_that_the_command_needs_the_query(origin, cache):
    url = origin.add("model.pth", b"")
    with pytest.raises(rankload.errors.OfflineError, match="with the query and headers of this call") as caught:
        rankload.dist_fetch(url + "?sig=SECRET", cache, offline=True, headers={"Authorization": "SECRET"})
    assert "SECRET" not in str(caught.value)


def test_environment_variable(origin, cache, monkeypatch):
    url = origin.add("file.bin", b"content")
    monkeypatch.setenv("RANKLOAD_OFFLINE", "1")
    with pytest.raises(rankload.errors.OfflineError):
        rankload.dist_fetch(url, cache)
    assert rankload.dist_fetch(url, cache, offline=False).read_bytes() == b"content"  # the argument wins
    assert rankload.dist_fetch(url, cache).read_bytes() == b"content"


def test_no_socket_is_opened(origin, cache):
    url = origin.add("file.bin", b"content")
    rankload.dist_fetch(url, cache)
    code = f"""{NO_SOCKETS}
import rankload
print(rankload.dist_fetch({url!r}, {str(cache)!r}, offline=True).read_bytes())
try:
    rankload.dist_fetch({url + "x"!r}, {str(cache)!r}, offline=True)
except rankload.errors.OfflineError:
    print("offline")
try:
    rankload.dist_fetch({url + "x"!r}, {str(cache)!r})
except AssertionError:
    print("the trap works")
"""
    assert run_script(code).check().stdout.splitlines() == ["b'content'", "offline", "the trap works"]


def test_damaged_file_is_not_served(origin, cache):
    url = origin.add("file.bin", b"content")
    path = rankload.dist_fetch(url, cache)
    path.write_bytes(b"cont")
    with pytest.raises(rankload.errors.OfflineError):
        rankload.dist_fetch(url, cache, offline=True)


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"sha256": "0" * 64}, "another one is expected"), ({"sidecar": True}, "its sidecar")]
)
def test_why_a_cached_file_does_not_do(origin, cache, arguments, reason):
    url = origin.add("file.bin", b"content")
    path = rankload.dist_fetch(url, cache)
    with pytest.raises(rankload.errors.OfflineError, match=reason) as caught:
        rankload.dist_fetch(url, cache, offline=True, **arguments)
    assert f"{path} cannot be used" in str(caught.value)


def test_url_without_a_file_name(origin, cache):
    with pytest.raises(rankload.errors.OfflineError, match=r"--file-name model\.pth"):
        rankload.dist_fetch(f"{origin.base_url}/", cache, file_name="model.pth", offline=True)


def test_plain_download(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKLOAD_OFFLINE", "1")
    local = tmp_path / "local.bin"
    local.write_bytes(b"content")
    with pytest.raises(rankload.errors.OfflineError, match="offline"):
        hub.download_url_to_file(origin.add("file.bin", b"content"), str(tmp_path / "file.bin"))
    hub.download_url_to_file(local.as_uri(), str(tmp_path / "copy.bin"))
    assert (origin.request_count(), (tmp_path / "copy.bin").read_bytes()) == (0, b"content")
