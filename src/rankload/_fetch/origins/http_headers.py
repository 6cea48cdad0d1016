"""Parse HTTP response headers. Pure."""

from __future__ import annotations

import base64
import binascii
import email.utils
import re
import time
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from rankload._fetch.origins.origin import Claim, Version
from rankload._types import is_sha256

#: 18 digits suffice for an exabyte. Python refuses to parse numbers of thousands of digits.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE | re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)

#: Content codings of RFC 9110, 8.4.1, and IANA's registry, as far as servers use them.
_CODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz"})

_ASCII = "".join(map(chr, range(128)))

#: Members of a Repr-Digest (RFC 9530: ``sha-256=:<base64>:``) or Digest (RFC 3230: ``SHA-256=<base64>``) header.
_DIGEST_MEMBER = re.compile(r"(?:^|,)\s*sha-256=:?([A-Za-z0-9+/]{43}=):?", re.IGNORECASE)


def version_of(headers: Mapping[str, str], size_bytes: int | None, earlier_claim: Claim | None) -> Version:
    """Return the version of the whole content that a response describes.

    Args:
        headers: headers of the response.
        size_bytes: size of the whole content, from Content-Range or Content-Length.
        earlier_claim: digest that an earlier redirect gave; None for none.
    """
    return Version(
        size_bytes=size_bytes,
        etag=headers.get("ETag"),
        last_modified=headers.get("Last-Modified"),
        claim=earlier_claim or claim_of(headers),
        content_type=headers.get("Content-Type", "").partition(";")[0].strip().lower(),
    )


def content_range_of(headers: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    """Return begin, end (exclusive) and total size of a partial response; None if the header is invalid."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if match is None:
        return None
    begin, end, total = int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])
    return (begin, end, total) if begin < end and (total is None or end <= total) else None


def content_length_of(headers: Mapping[str, str]) -> int | None:
    """Return Content-Length; None if the header is missing or empty. Equal values count as one (RFC 9110, 8.6).

    Raises:
        ValueError: the header holds no number. Without it, nothing would show that a body was cut off.
    """
    texts = {text.strip() for text in headers.get("Content-Length", "").split(",")}
    if texts == {""}:
        return None
    if len(texts) > 1 or not _LENGTH.fullmatch(text := texts.pop()):
        raise ValueError("no number")
    return int(text)


def coding_of(headers: Mapping[str, str]) -> str | None:
    """Return the content coding of the body, in lower case; None if the body is the file's own bytes.

    Object stores return any text that the uploader wrote (``aws-chunked``, ``utf-8``): unknown words are no codings.
    """
    words = (word.strip().lower() for word in headers.get("Content-Encoding", "").split(","))
    return next((word for word in words if word in _CODINGS), None)


def transfer_coding_of(lines: Sequence[str]) -> str | None:
    """Return the transfer coding that the HTTP library leaves on a body; None if it leaves none.

    http.client decodes chunks only if the header is the bare word ``chunked``. With ``gzip, chunked``, or a trailing
    blank, the body keeps the sizes of its chunks.

    Args:
        lines: values of the Transfer-Encoding headers.
    """
    words = {line.lower() for line in lines}
    return None if words in (set(), {"chunked"}, {"identity"}) else ", ".join(lines)


def location_of(headers: Mapping[str, str]) -> str | None:
    """Return the target of a redirect; None without a Location header.

    Some servers send a path in raw UTF-8, which the HTTP library decodes as latin-1. Browsers percent-encode it.
    """
    text = headers.get("Location")
    return None if text is None else quote(text.encode("latin-1"), safe=_ASCII)


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return Retry-After in seconds from now. The header holds a number or a date (RFC 9110, 10.2.3)."""
    text = headers.get("Retry-After", "").strip()
    if _LENGTH.fullmatch(text):
        return float(text)
    try:
        seconds_since_epoch = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):  # not a date, or a number too large for a C integer
        return None
    return max(0.0, seconds_since_epoch - time.time())


def claim_of(headers: Mapping[str, str]) -> Claim | None:
    """Return the SHA-256 of the whole content from the headers; None if they give none.

    - ``Repr-Digest`` (RFC 9530) and its predecessor ``Digest`` (RFC 3230) cover the whole content even in a partial
      response; ``PartialContent-Digest`` does not.
    - ``x-amz-checksum-sha256`` of a multipart upload is a digest of digests, and ends in ``-<number of parts>``
      (Amazon S3 User Guide, "Checking object integrity").
    - ``X-Linked-ETag`` holds the SHA-256 of a file in the Hugging Face Hub's large-file storage.
    """
    for name in ("Repr-Digest", "Digest"):
        if (match := _DIGEST_MEMBER.search(headers.get(name, ""))) and (digest := _hex(match[1])):
            return Claim(digest, name.lower())
    name = "x-amz-checksum-sha256"
    if (
        "COMPOSITE" not in headers.get("x-amz-checksum-type", "").upper()
        and (text := headers.get(name))
        and (digest := _hex(text))
    ):
        return Claim(digest, name)
    linked = headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"').lower()
    return Claim(linked, "x-linked-etag") if is_sha256(linked) else None


def _hex(text: str) -> str | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw.hex() if len(raw) == 32 else None
