"""The interface of an origin, whatever its protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from rankload._urls import Url


@dataclass(frozen=True)
class Claim:
    """An expected SHA-256 of a file, and its source.

    Attributes:
        sha256: hex digits; for a hash prefix in a file name only the first ones.
        source: source of the digest, for the record and the log: ``sha256``, ``hash_prefix``, ``repr-digest``, …
    """

    sha256: str
    source: str


@dataclass(frozen=True)
class Version:
    """An origin's description of the content that it serves at the moment.

    Attributes:
        size_bytes: size of the whole content; None if the origin does not give one.
        etag: ETag validator with its quotes and ``W/``; never a digest.
        last_modified: Last-Modified validator.
        claim: digest of the whole content; None if the origin gives none.
        content_type: media type in lower case, or an empty string.
    """

    size_bytes: int | None
    etag: str | None = None
    last_modified: str | None = None
    claim: Claim | None = None
    content_type: str = ""

    @property
    def has_validator(self) -> bool:
        """Whether a change of the content can be detected."""
        return bool(self.etag or self.last_modified or self.claim)

    def can_be_told_from(self, earlier: Version) -> bool:
        """Return whether content other than an earlier response's is detected, now or by a digest at the end."""
        has_common = (self.etag and earlier.etag) or (self.last_modified and earlier.last_modified)
        return bool(earlier.claim or has_common)

    def is_same_as(self, other: Version) -> bool:
        """Return whether two responses describe the same content. Only facts that both give are compared."""
        pairs = (
            (self.size_bytes, other.size_bytes),
            (_opaque(self.etag), _opaque(other.etag)),
            (self.claim and self.claim.sha256, other.claim and other.claim.sha256),
        )
        if any(ours and theirs and ours != theirs for ours, theirs in pairs):
            return False
        if self.etag and other.etag:
            return True
        dates = (self.last_modified, other.last_modified)
        return not all(dates) or dates[0] == dates[1]


class Body(Protocol):
    """The bytes of one response.

    Attributes:
        version: version of the whole content, as the response describes it.
        begin: offset of the first byte in the file.
        end: offset one past the last byte; None if unknown until the body ends.
        is_whole: whether the origin sends the whole file, even if a range was requested.
    """

    version: Version
    begin: int
    end: int | None
    is_whole: bool

    def read(self) -> bytes:
        """Return the next available bytes; an empty string at the end of the body.

        Raises:
            FetchError: the connection broke, or no byte came in time.
        """

    def break_off(self) -> None:
        """Make a read that waits in another thread return or fail at once, if possible."""


class Origin(Protocol):
    """A server or filesystem that serves one file.

    Attributes:
        url: URL of the file.
        display_name: the URL without secrets, for messages.
        may_answer_once: whether the URL may be valid for one request only. The first request should then ask for all
            bytes.
    """

    url: Url
    display_name: str
    may_answer_once: bool

    def open(
        self, begin: int, end: int | None, version: Version | None, *, unless: Version | None = None
    ) -> AbstractContextManager[Body]:
        """Request a range of the content.

        Args:
            begin, end: offsets in bytes, ``end`` exclusive. ``end=None`` requests the whole file, without a range.
            version: version that an earlier response described; only a range of that version is usable.
            unless: version that the caller already has.

        Raises:
            NotModified: the content is still of the version ``unless``.
            ContentChangedError: the origin serves another version than ``version`` now.
            UnusableRange: the response is not the requested range.
            FetchError: the origin did not answer, or answered with an error.
        """

    def close(self) -> None:
        """Close connections, and end requests that other threads still wait for, if possible."""


class NotModified(Exception):
    """The origin's content is still of the version that the caller has."""


class UnusableRange(Exception):
    """The response to a range request is invalid. A request without a range may still work.

    Attributes:
        is_refusal: whether the origin refuses every range, but serves the whole file.
    """

    def __init__(self, text: str, *, is_refusal: bool = False) -> None:
        super().__init__(text)
        self.is_refusal = is_refusal


def _opaque(etag: str | None) -> str | None:
    return etag.removeprefix("W/") if etag else None
