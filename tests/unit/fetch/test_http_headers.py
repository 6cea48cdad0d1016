"""What response headers say."""

from __future__ import annotations

import base64
import email.utils
import time

import pytest
from requests.structures import CaseInsensitiveDict

from rankload._fetch.origins.http_headers import (
    claim_of,
    content_length_of,
    content_range_of,
    retry_after_of,
    transfer_coding_of,
    version_of,
)
from rankload._fetch.origins.origin import Claim, Version

SHA256 = "ab" * 32
BASE64 = base64.b64encode(bytes.fromhex(SHA256)).decode()
OTHER = Claim("cd" * 32, "x-linked-etag")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 0-9/10", (0, 10, 10)),
        ("bytes 5-5/10", (5, 6, 10)),
        ("BYTES 0-9/10", (0, 10, 10)),
        (" bytes 0-9/10 ", (0, 10, 10)),
        ("bytes 0-9/*", (0, 10, None)),
        ("bytes 9-0/10", None),
        ("bytes 0-10/10", None),  # ends behind the end
        ("bytes */10", None),
        ("bytes 0-9", None),
        ("bytes=0-9/10", None),
        ("bytes -9/10", None),
        ("bytes 0-9/10, bytes 20-29/100", None),
        ("items 0-9/10", None),
        ("", None),
        (None, None),
    ],
)
def test_content_range(text, expected):
    assert content_range_of({} if text is None else {"Content-Range": text}) == expected


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("123 ", 123), ("12, 12", 12), ("", None)])
def test_content_length(text, expected):
    assert content_length_of({"Content-Length": text}) == expected
    assert content_length_of({}) is None


@pytest.mark.parametrize("text", ["-1", "+1", "1_0", "1e3", "12, 13", "12,", "9" * 19])
def test_content_length_that_is_no_number(text):
    with pytest.raises(ValueError, match="no number"):
        content_length_of({"Content-Length": text})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], None),
        (["chunked"], None),
        (["Chunked", "chunked"], None),
        (["identity"], None),
        (["chunked "], "chunked "),
        (["chunked", "gzip"], "chunked, gzip"),
        (["identity", "chunked"], "identity, chunked"),
    ],
)
def test_transfer_coding(lines, expected):
    assert transfer_coding_of(lines) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("120", 120), (" 7 ", 7), ("-5", None), ("1.5", None), ("soon", None), ("", None)],
)
def test_retry_after_in_seconds(text, expected):
    assert retry_after_of({"Retry-After": text}) == expected
    assert retry_after_of({}) is None


@pytest.mark.parametrize(("ahead", "least", "most"), [(3600, 3590, 3600), (0, 0, 0), (-3600, 0, 0)])
@pytest.mark.parametrize("is_gmt", [True, False])
def test_retry_after_as_a_date(ahead, least, most, is_gmt):
    date = email.utils.formatdate(time.time() + ahead, usegmt=is_gmt)
    found = retry_after_of({"Retry-After": date})
    assert found is not None and least <= found <= most


@pytest.mark.parametrize("date", ["Wed, 21 Oct 99999999 07:28:00 GMT", "Wed, 99 Oct 2015 07:28:00 GMT", "²"])
def test_retry_after_that_is_no_date(date):
    assert retry_after_of({"Retry-After": date}) is None


@pytest.mark.parametrize(
    ("headers", "source"),
    [
        ({"Repr-Digest": f"sha-256=:{BASE64}:"}, "repr-digest"),
        ({"Repr-Digest": f"md5=:AAAA:, sha-256=:{BASE64}:, sha-512=:AAAA:"}, "repr-digest"),
        ({"repr-digest": f"SHA-256=:{BASE64}:"}, "repr-digest"),
        ({"Digest": f"SHA-256={BASE64}"}, "digest"),
        ({"Digest": f"md5=AAAA,sha-256={BASE64}"}, "digest"),
        ({"x-amz-checksum-sha256": BASE64}, "x-amz-checksum-sha256"),
        ({"x-amz-checksum-sha256": BASE64, "x-amz-checksum-type": "FULL_OBJECT"}, "x-amz-checksum-sha256"),
        ({"X-Linked-ETag": f'"{SHA256}"'}, "x-linked-etag"),
        ({"X-Linked-ETag": f'W/"{SHA256.upper()}"'}, "x-linked-etag"),
        ({"Repr-Digest": f"sha-256=:{BASE64}:", "X-Linked-ETag": f'"{"cd" * 32}"'}, "repr-digest"),
        ({"Repr-Digest": "md5=:AAAA:", "Digest": f"sha-256={BASE64}"}, "digest"),
    ],
)
def test_claim(headers, source):
    assert claim_of(CaseInsensitiveDict(headers)) == Claim(SHA256, source)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": f'"{SHA256}"'},
        {"Content-Digest": f"sha-256=:{BASE64}:"},
        {"Want-Repr-Digest": "sha-256=10"},
        {"Repr-Digest": f"sha-512=:{BASE64}:"},
        {"Repr-Digest": f"x-sha-256=:{BASE64}:"},
        {"Repr-Digest": f"sha-256=:{BASE64[:-4]}:"},
        {"Repr-Digest": f"sha-256=:{BASE64[:-1]}A:"},
        {"Digest": f"sha-256={SHA256}"},
        {"x-amz-checksum-sha256": f"{BASE64}-3"},
        {"x-amz-checksum-sha256": BASE64, "x-amz-checksum-type": "COMPOSITE"},
        {"x-amz-checksum-sha256": BASE64, "x-amz-checksum-type": "composite"},
        {"x-amz-checksum-sha256": "AAAA"},
        {"x-amz-checksum-crc32c": "AAAAAA=="},
        {"X-Linked-ETag": f'"{SHA256}00"'},
        {"X-Linked-ETag": '"d41d8cd98f00b204e9800998ecf8427e"'},
    ],
)
def test_no_claim(headers):
    assert claim_of(CaseInsensitiveDict(headers)) is None


def test_version():
    headers = {"ETag": '"1"', "Last-Modified": "then", "Content-Type": "Text/HTML; charset=utf-8"}
    assert version_of(headers, 5, None) == Version(5, '"1"', "then", None, "text/html")
    assert version_of({}, None, None) == Version(None)
    assert version_of({"X-Linked-ETag": SHA256}, None, OTHER).claim == OTHER  # a redirect's comes first


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (Version(5), Version(5), True),
        (Version(5), Version(6), False),
        (Version(5), Version(None), True),
        (Version(5, '"1"'), Version(5, '"1"'), True),
        (Version(5, '"1"'), Version(5, '"2"'), False),
        (Version(5, '"1"'), Version(5, 'W/"1"'), True),
        (Version(5, 'W/"1"'), Version(5, 'W/"2"'), False),
        (Version(5, '"1"'), Version(5), True),
        (Version(5, '"1"', "then"), Version(5, '"1"', "now"), True),  # touched, or another server of the farm
        (Version(5, None, "then"), Version(5, None, "now"), False),
        (Version(5, None, "then"), Version(5, None, "then"), True),
        (Version(5, None, "then"), Version(5), True),
        (Version(5, claim=OTHER), Version(5, claim=Claim(SHA256, "digest")), False),
        (Version(5, claim=OTHER), Version(5, claim=Claim(OTHER.sha256, "digest")), True),
        (Version(5, '"1"', claim=OTHER), Version(5, '"1"', claim=Claim(SHA256, "digest")), False),
    ],
)
def test_same_version(one, other, is_same):
    assert one.is_same_as(other) == other.is_same_as(one) == is_same


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (Version(5), False),
        (Version(5, '"1"'), True),
        (Version(5, 'W/"1"'), True),
        (Version(5, None, "then"), True),
        (Version(5, claim=OTHER), True),
    ],
)
def test_validator(version, expected):
    assert version.has_validator == expected
