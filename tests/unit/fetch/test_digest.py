"""SHA-256 in a thread of its own."""

import hashlib
import threading

import pytest

from rankload._fetch.digest import DigestThread, sha256_of_file


def rankload_threads():
    return [thread for thread in threading.enumerate() if thread.name == "rankload-digest"]


def test_pieces_in_order():
    digest = DigestThread()
    pieces = [bytes([number % 256]) * 1000 for number in range(500)]
    for piece in pieces:
        digest.update(piece)
    assert digest.finish() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert rankload_threads() == []


@pytest.mark.timeout(20)
def test_failure_is_raised_and_never_blocks():
    """More pieces than the queue holds: a dead thread must not make update() wait for ever."""
    digest = DigestThread()
    for _ in range(200):
        digest.update("no bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        digest.finish()
    assert rankload_threads() == []


def test_of_a_file(tmp_path):
    content = bytes(range(256)) * 40_000  # more than one read
    (tmp_path / "file").write_bytes(content)
    seen = []
    assert sha256_of_file(tmp_path / "file", seen.append) == hashlib.sha256(content).hexdigest()
    assert seen[-1] == len(content) and seen == sorted(seen) and len(seen) > 1
