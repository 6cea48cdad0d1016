"""Find the server certificates to trust."""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from urllib3.util.ssl_ import create_urllib3_context

from rankload.errors import FetchError

#: Variables of requests and curl; requests reads both. Their certificates replace all others.
_OF_REQUESTS = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

#: Variables of OpenSSL, which Python's ssl module, and so torch.hub, reads.
_OF_OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")

#: All these variables, in order of precedence.
CERTIFICATE_VARIABLES = (*_OF_REQUESTS, *_OF_OPENSSL)


@dataclass(frozen=True)
class Trust:
    """The certificates to trust: those that the environment names, else the system's and certifi's.

    Attributes:
        path: file or folder of certificates; None for certifi's file.
        variable: environment variable that names ``path``.
        is_alone: whether only ``path`` counts, without the system's certificates and those of OpenSSL's variables.
    """

    path: str | None
    variable: str = ""
    is_alone: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Trust:
        """Read the environment variables. The first one set counts. Opens no file."""
        for name in CERTIFICATE_VARIABLES:
            if value := environ.get(name):
                # OpenSSL takes a list of folders: `context` loads all of them
                path = value.partition(os.pathsep)[0] if name == "SSL_CERT_DIR" else value
                return cls(path, name, is_alone=name in _OF_REQUESTS)
        return cls(None)

    def check(self, display_name: str) -> None:
        """Check that the file or folder that the environment names exists.

        Args:
            display_name: the URL to request, for the message.

        Raises:
            FetchError: the file or folder does not exist.
        """
        if self.path is not None and not os.path.exists(self.path):  # noqa: PTH110 - as requests and OpenSSL take it
            raise FetchError(
                f"{display_name}: {self.variable}={self.path}: no such file or folder of certificates: correct the "
                "variable, or unset it",
                url=display_name,
            )

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        """Initial context of TLS connections. The HTTP library adds the certificates at ``path``, or certifi's."""
        context = create_urllib3_context()
        if not self.is_alone:
            context.load_default_certs()
        return context
