"""Files on the Hugging Face Hub: huggingface_hub says where a file is, and the bytes come over HTTP.

huggingface_hub's own filesystem reads ranges, too, but resolves the URL for every range. This origin remembers
redirects, checks validators, and uses the digest that the Hub gives.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from typing_extensions import override

from rankload._fetch.hub_names import HubFile, check_endpoint
from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.filesystem import filesystem_of, wrap_any_errors
from rankload._fetch.origins.http import HttpOrigin
from rankload._fetch.origins.http_body import HttpBody
from rankload._fetch.origins.origin import Origin, Version
from rankload._settings import Settings
from rankload._urls import Url


class HuggingFaceOrigin(Origin):
    """A file at ``hf://[datasets/|spaces/]owner/name[@revision]/path``."""

    def __init__(self, url: Url, headers: Headers, settings: Settings) -> None:
        self.url, self.display_name, self.may_answer_once = url, url.display_name, False
        self._headers, self._settings = headers, settings

    @override
    def open(
        self, begin: int, end: int | None, version: Version | None, *, unless: Version | None = None
    ) -> AbstractContextManager[HttpBody]:
        return self._http.open(begin, end, version, unless=unless)

    @override
    def close(self) -> None:
        if "_http" in self.__dict__:
            self._http.close()

    @functools.cached_property
    def _http(self) -> HttpOrigin:
        check_endpoint()
        with wrap_any_errors(self.url.raw, self.display_name):
            return HttpOrigin(Url.parse(_address_of(self.url.raw)), self._headers, self._settings)


def _address_of(url: str) -> str:
    """Return the HTTP address of an ``hf://`` URL. Asks the Hub only about datasets and spaces."""
    if (file := HubFile.parse(url)) is not None:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(file.repository, file.path, revision=file.revision)
    filesystem, path = filesystem_of(url)
    return str(filesystem.url(path))
