"""SHA-256 of a file."""

import hashlib

from rankload._fetch.file_digest import sha256_of_file


def test_of_a_file(tmp_path):
    content = bytes(range(256)) * 40_000  # more than one read
    (tmp_path / "file").write_bytes(content)
    seen = []
    assert sha256_of_file(tmp_path / "file", seen.append) == hashlib.sha256(content).hexdigest()
    assert seen[-1] == len(content) and seen == sorted(seen) and len(seen) > 1
