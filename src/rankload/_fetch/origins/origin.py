"""The interface of an origin, whatever its protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from rankload._urls import Url


@dataclass(frozen=True)
class Claim:
    """A SHA-256 that somebody says the file has.

    Attributes:
        sha256: hex digits; leading ones only for a file name's hash prefix.
        source: who says so, as it goes into the record and the log: ``sha256``, ``hash_prefix``, ``repr-digest``, …
    """

    sha256: str
    source: str


@dataclass(frozen=True)
class Version:
    """What an origin says of the content that it serves at the moment.

    Attributes:
        size_bytes: None where it does not tell.
        etag: the validator, quotes and ``W/`` included; never a digest.
        last_modified: the other validator.
        claim: a digest of the whole content, where the origin gives one.
        content_type: the media type, lower case, or an empty string.
    """

    size_bytes: int | None
    etag: str | None = None
    last_modified: str | None = None
    claim: Claim | None = None
    content_type: str = ""

    @property
    def has_validator(self) -> bool:
        """Whether a change of the content would show."""
        return bool(self.etag or self.last_modified or self.claim)

    def can_be_told_from(self, earlier: Version) -> bool:
        """Return whether other content than an earlier answer's would show, now or by a digest in the end."""
        has_common = (self.etag and earlier.etag) or (self.last_modified and earlier.last_modified)
        return bool(earlier.claim or has_common)

    def is_same_as(self, other: Version) -> bool:
        """Return whether two answers speak of the same content, as far as both tell."""
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
    """One answer's bytes.

    Attributes:
        version: what the answer says of the whole content.
        begin: offset of its first byte in the file.
        end: offset one past its last byte; None where only its end will tell.
        is_whole: the origin sends everything, whatever was asked for.
    """

    version: Version
    begin: int
    end: int | None
    is_whole: bool

    def read(self) -> bytes:
        """Return the next bytes, as many as are there; nothing at the end of the body.

        Raises:
            FetchError: it broke, or no byte came in time.
        """

    def break_off(self) -> None:
        """Let a read that waits in another thread return or fail at once, if that can be done."""


class Origin(Protocol):
    """A place that serves one file.

    Attributes:
        url: of the file.
        display_name: the same for messages, without secrets.
        may_answer_once: a request may use the URL up, so the first one should ask for everything.
    """

    url: Url
    display_name: str
    may_answer_once: bool

    def open(
        self, begin: int, end: int | None, version: Version | None, *, unless: Version | None = None
    ) -> AbstractContextManager[Body]:
        """Ask for a range of the content, ``end`` exclusive; None asks for everything, with no range at all.

        Args:
            begin, end: offsets in bytes.
            version: what an earlier answer said; the range is wanted of that version alone.
            unless: nothing is wanted if the content is still of this version.

        Raises:
            NotModified: it is.
            ContentChangedError: the origin has another version now.
            UnusableRange: its answer is not the range that was asked for.
            FetchError: there was no answer, or an error.
        """

    def close(self) -> None:
        """Let go of connections, and end the requests that other threads still wait for, if that can be done."""


class NotModified(Exception):
    """The origin's content is still of the version that was named."""


class UnusableRange(Exception):
    """An answer to a range request that makes no sense; a request without a range may still work.

    Attributes:
        is_refusal: it does work, and no range does.
    """

    def __init__(self, text: str, *, is_refusal: bool = False) -> None:
        super().__init__(text)
        self.is_refusal = is_refusal


def _opaque(etag: str | None) -> str | None:
    return etag.removeprefix("W/") if etag else None
