"""Long bodies over plain HTTP go from the socket into the file within the kernel."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

import rankload
from harness.replies import Reply

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) is Linux's")


@pytest.fixture(autouse=True)
def long_requests(monkeypatch):
    """All in one request, which is long enough."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(48 * MIB))
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")


@pytest.fixture(scope="module")
def long_content():
    return b"".join(number.to_bytes(8, "little") for number in range(5 * MIB))


@pytest.fixture
def moved(monkeypatch):
    """Bytes that splice has moved into pipes and out of them."""
    splice, counts = os.splice, []

    def counting(*arguments, **keywords):
        counts.append(splice(*arguments, **keywords))
        return counts[-1]

    monkeypatch.setattr(os, "splice", counting)
    return counts


@pytest.fixture
def cannot(monkeypatch):
    """A kernel without it."""

    def fail(*arguments, **keywords):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "splice", fail)


def test_goes_past_this_process_and_is_verified(origin, cache, long_content, moved):
    digest = hashlib.sha256(long_content).hexdigest()
    path = rankload.dist_fetch(origin.add("file.bin", long_content), cache, sha256=digest, progress=False)
    assert path.read_bytes() == long_content
    assert sum(moved) > 2 * 39 * MIB  # into the pipe and out of it; the first piece comes with the head


def test_wrong_digest_is_found_out(origin, cache, long_content):
    url = origin.add("file.bin", long_content)
    with pytest.raises(rankload.DigestMismatchError):
        rankload.dist_fetch(url, cache, sha256="0" * 64, progress=False)
    assert not (cache / "file.bin").exists()


@pytest.mark.parametrize("fault", [{"truncate_at": 35 * MIB}, {"reset_at": 35 * MIB}, {"hold_at": 35 * MIB}])
def test_body_that_breaks_off_is_gone_on_with(origin, cache, long_content, monkeypatch, moved, fault):
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.5")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    url = origin.add("file.bin", long_content, Reply(**fault), Reply())
    assert rankload.dist_fetch(url, cache, progress=False).read_bytes() == long_content
    assert sum(moved) > 2 * 30 * MIB
    assert len(origin.requests()) == 2 and int(origin.requests()[1].headers["range"][6:].partition("-")[0]) > 0


def test_kernel_that_cannot_makes_no_difference(origin, cache, long_content, cannot):
    assert rankload.dist_fetch(origin.add("file.bin", long_content), cache, progress=False).read_bytes() == long_content
    assert origin.request_count() == 1


@pytest.mark.parametrize("reply", [Reply(is_chunked=True), Reply(content_length=False)])
def test_body_whose_end_only_the_origin_knows_is_read(origin, cache, long_content, moved, reply):
    url = origin.add("file.bin", long_content, reply)
    assert rankload.dist_fetch(url, cache, progress=False).read_bytes() == long_content
    assert moved == []


def test_short_body_is_read_and_keeps_its_connection(origin, cache, big_content, moved):
    rankload.dist_fetch(origin.add("file.bin", big_content), cache, progress=False)
    assert moved == []
