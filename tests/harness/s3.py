"""An S3 server on a free loopback port: moto's, which wants requests signed and checks no secret.

    with s3() as storage:
        url = storage.put("bucket/model.pth", content)  # s3://bucket/model.pth
        run_script(client, url, env=storage.environment)

For faults of the connection put ``chaos`` before it: ``{"AWS_ENDPOINT_URL": link.through(storage.endpoint_url)}``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from harness.listening import wait_until_listening
from harness.ports import reserved_port
from harness.scripts import Program, start_program
from harness.spawner import spawner

_REGION = "us-east-1"
_KEY, _SECRET = "test-key", "test-secret"
# werkzeug's log lines, coloured by status.
_LINE = re.compile(r'"(?:\x1b\[\d+m)*(?P<method>[A-Z]+) (?P<path>[^ ?]+)\S* HTTP/1\.1(?:\x1b\[\d+m)*" (?P<status>\d+)')


@dataclass(frozen=True)
class StorageAccess:
    """One request.

    Attributes:
        path: /bucket/key
    """

    method: str
    path: str
    status: int


@dataclass(frozen=True)
class Storage:
    """A running server.

    Attributes:
        client: boto3's, for what has no method here.
    """

    port: int
    client: Any = field(repr=False)
    _program: Program = field(repr=False)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables by which botocore, and so boto3 and s3fs, find the server, and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",  # without keys botocore asks a link-local address for some
            "AWS_PROFILE": None,
            "AWS_SESSION_TOKEN": None,
        }

    def put(self, name: str, content: bytes, *, is_public: bool = False) -> str:
        """Stores an object with its SHA-256 under ``bucket/key``; returns its URL.

        Args:
            is_public: Plain, unsigned GETs may have it: ``endpoint_url/name``.
        """
        bucket, _, key = name.partition("/")
        self.client.create_bucket(Bucket=bucket)  # in this region it is no error that it is there already
        access = "public-read" if is_public else "private"
        self.client.put_object(Bucket=bucket, Key=key, Body=content, ChecksumAlgorithm="SHA256", ACL=access)
        return f"s3://{name}"

    def accesses(self) -> list[StorageAccess]:
        """Requests so far, those of ``put`` too."""
        return [
            StorageAccess(match["method"], unquote(match["path"]), int(match["status"]))
            for match in _LINE.finditer(self._program.stderr)
        ]


@contextlib.contextmanager
def s3() -> Iterator[Storage]:
    """Serves until the block ends; what it stores is gone then."""
    import boto3  # takes a third of a second

    scratch = spawner().new_directory()
    try:
        with reserved_port() as port:
            # moto_server without its script, which may not be on the path; in an empty folder, or Python would
            # find modules in the current one first.
            code = "from moto.server import main; main()"
            command = [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)]
            with start_program(command, env={"TMPDIR": str(scratch)}, working_dir=scratch) as program:
                wait_until_listening(program, port)
                client = boto3.client(
                    "s3",
                    endpoint_url=f"http://127.0.0.1:{port}",
                    region_name=_REGION,
                    aws_access_key_id=_KEY,
                    aws_secret_access_key=_SECRET,
                )
                try:
                    yield Storage(port, client, program)
                finally:
                    client.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
