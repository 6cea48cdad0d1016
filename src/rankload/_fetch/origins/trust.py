"""Which server certificates are trusted."""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from urllib3.util.ssl_ import create_urllib3_context

from rankload.errors import FetchError

#: requests' own, and curl's, which requests takes as well. They replace all others.
_OF_REQUESTS = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

#: OpenSSL's, by which Python's ssl module, and so torch.hub, goes.
_OF_OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")

#: All of them, for messages.
CERTIFICATE_VARIABLES = (*_OF_REQUESTS, *_OF_OPENSSL)


@dataclass(frozen=True)
class Trust:
    """Whose certificates are believed: those that the environment names, else the system's and certifi's.

    Attributes:
        path: a file or a folder of certificates; None for certifi's file.
        variable: which environment variable names it.
        is_alone: whether the system's do not count, nor those of OpenSSL's variables.
    """

    path: str | None
    variable: str = ""
    is_alone: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Trust:
        """Read the variables; the first that is set counts. Looks at no file."""
        for name in CERTIFICATE_VARIABLES:
            if value := environ.get(name):
                # OpenSSL takes a list of folders; `context` has all of them
                path = value.partition(os.pathsep)[0] if name == "SSL_CERT_DIR" else value
                return cls(path, name, is_alone=name in _OF_REQUESTS)
        return cls(None)

    def check(self, display_name: str) -> None:
        """Check that what the environment names is there.

        Args:
            display_name: the URL that is to be asked, for the message.

        Raises:
            FetchError: it is not.
        """
        if self.path is not None and not os.path.exists(self.path):  # noqa: PTH110 - as requests and OpenSSL take it
            raise FetchError(
                f"{display_name}: {self.variable}={self.path}: there is no such file or folder of certificates: "
                "correct the variable, or unset it",
                url=display_name,
            )

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        """What TLS connections begin with; the HTTP library adds what is at ``path``, or certifi's."""
        context = create_urllib3_context()
        if not self.is_alone:
            context.load_default_certs()
        return context
