"""A certificate authority of the test's own, and the server certificates that it signs.

    authority = Authority(tmp_path)
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        run_script(client, server.url("model.pth"), env=authority.environment)

The keys are elliptic: made in a millisecond, where RSA takes a second of luck.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


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
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("rankload tests")
        builder = _builder(self._name, self._name, self._key, is_expired=False)
        self._certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.path = self._directory / "ca.pem"
        self.path.write_bytes(_pem(self._certificate))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a process trust it: Python's ssl, requests, curl and botocore, in this order."""
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
        return dict.fromkeys(names, str(self.path))

    def certificate(self, *names: str, is_expired: bool = False) -> Certificate:
        """A certificate for host names and addresses. A wrong one is one for another name."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = (
            _builder(_name(names[0]), self._name, key, is_expired)
            .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        stem = f"{names[0]}-{signed.serial_number:x}"
        certificate = Certificate(self._directory / f"{stem}.pem", self._directory / f"{stem}.key")
        certificate.chain.write_bytes(_pem(signed) + _pem(self._certificate))
        certificate.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, is_expired: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 3 * _DAY)
        .not_valid_after(now - _DAY if is_expired else now + _DAY)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
