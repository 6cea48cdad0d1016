"""A certificate authority of the test's own, and the server certificates that it signs.

authority = Authority(tmp_path)
with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
    run_script(client, server.url("model.pth"), env=authority.environment)
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    """Of a server, as PEM files.

    Attributes:
        chain: The certificate and the authority's.
    """

    chain: Path
    key: Path


class Authority:
    """Signs certificates; clients trust it that are told to.

    Attributes:
        path: Its own certificate, as clients want it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "authority"
        self._directory.mkdir(parents=True)
        self._authority = trustme.CA()
        self._count = 0
        self.path = self._directory / "ca.pem"
        self._authority.cert_pem.write_to_path(self.path)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a process trust it: Python's ssl, requests, curl and botocore, in this order."""
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
        return dict.fromkeys(names, str(self.path))

    def certificate(self, *names: str, is_expired: bool = False) -> Certificate:
        """A certificate for host names and addresses. A wrong one is one for another name."""
        now = datetime.datetime.now(datetime.timezone.utc)
        day = datetime.timedelta(days=1)
        signed = self._authority.issue_cert(
            *names, not_before=now - 3 * day, not_after=now - day if is_expired else now + day
        )
        self._count += 1
        stem = f"{names[0]}-{self._count}"
        certificate = Certificate(self._directory / f"{stem}.pem", self._directory / f"{stem}.key")
        certificate.chain.write_bytes(b"".join(pem.bytes() for pem in signed.cert_chain_pems) + self.path.read_bytes())
        signed.private_key_pem.write_to_path(certificate.key)
        return certificate
