"""The S3 server serves s3fs, boto3 and, where allowed, plain HTTP."""

import base64
import hashlib
import socket

import pytest

from harness.chaos import Fault, chaos
from harness.client import get
from harness.s3 import StorageAccess, s3
from harness.scripts import run_script

CONTENT = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def storage():
    with s3() as server:
        yield server


THROUGH_FSSPEC = """
import fsspec, hashlib, sys
filesystem, path = fsspec.url_to_fs(sys.argv[1])
info = filesystem.info(path)
print(info["size"], bool(info["ETag"]), filesystem.cat_file(path, start=10, end=14).hex())
with filesystem.open(path) as file:
    print(hashlib.sha256(file.read()).hexdigest())
"""


def test_a_process_reads_it_through_s3fs(storage):
    url = storage.put("weights/a folder/model.pth", CONTENT)
    assert url == "s3://weights/a folder/model.pth"
    result = run_script(THROUGH_FSSPEC, url, env=storage.environment).check()
    assert result.stdout.split("\n")[:2] == [
        f"{len(CONTENT)} True {CONTENT[10:14].hex()}",
        hashlib.sha256(CONTENT).hexdigest(),
    ]
    accesses = [access for access in storage.accesses() if access.path == "/weights/a folder/model.pth"]
    assert accesses[0] == StorageAccess("PUT", "/weights/a folder/model.pth", 200)
    assert StorageAccess("GET", "/weights/a folder/model.pth", 206) in accesses


def test_its_sha256_is_kept(storage):
    storage.put("weights/hashed", CONTENT)
    head = storage.client.head_object(Bucket="weights", Key="hashed", ChecksumMode="ENABLED")
    assert base64.b64decode(head["ChecksumSHA256"]) == hashlib.sha256(CONTENT).digest()


def test_what_is_missing_and_what_is_not_signed(storage):
    storage.put("weights/private", CONTENT)
    storage.put("weights/public", CONTENT, is_public=True)
    result = run_script(THROUGH_FSSPEC, "s3://weights/missing", env=storage.environment)
    assert "FileNotFoundError" in result.stderr
    assert get(f"{storage.endpoint_url}/weights/private")[0] == 403
    assert get(f"{storage.endpoint_url}/weights/public", Range="bytes=10-13")[2] == CONTENT[10:14]


def test_an_object_can_be_replaced(storage):
    url = storage.put("weights/changing", b"one")
    first = storage.client.head_object(Bucket="weights", Key="changing")["ETag"]
    assert storage.put("weights/changing", b"two") == url
    assert storage.client.head_object(Bucket="weights", Key="changing")["ETag"] != first


def test_through_a_broken_connection(storage):
    url = storage.put("weights/model.pth", CONTENT)
    with chaos(storage.port, Fault(cut_at=0), Fault()) as link:
        environment = {**storage.environment, "AWS_ENDPOINT_URL": link.through(storage.endpoint_url)}
        result = run_script(THROUGH_FSSPEC, url, env=environment).check()
        assert len(link.connections) > 1
    assert hashlib.sha256(CONTENT).hexdigest() in result.stdout


def test_it_is_gone_afterwards():
    with s3() as server:
        server.put("weights/x", b"x")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
