"""Which parameters of a query sign or authorise a request, and so are no part of a URL's identity."""

from __future__ import annotations

import itertools
import re
from urllib.parse import parse_qsl, unquote_plus

#: Parameters of signed queries, which differ between requests for the same file. A query is signed if it has all names
#: of a first set; then the names of the second set are left out. Names must match exactly, except for case.
_SIGNED_QUERIES: tuple[tuple[frozenset[str], frozenset[str]], ...] = tuple(
    (frozenset(required.split()), frozenset(f"{required} {others}".split()))
    for required, others in (
        # Amazon S3 API, "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)"
        (
            "x-amz-signature",
            "x-amz-algorithm x-amz-credential x-amz-date x-amz-expires x-amz-signedheaders x-amz-security-token "
            "x-amz-content-sha256",
        ),
        # Google Cloud Storage, "Signed URLs", V4
        ("x-goog-signature", "x-goog-algorithm x-goog-credential x-goog-date x-goog-expires x-goog-signedheaders"),
        # version 2 of Amazon S3, Google Cloud Storage, Alibaba OSS and Huawei OBS
        ("awsaccesskeyid signature expires", "x-amz-security-token"),
        ("googleaccessid signature expires", ""),
        ("ossaccesskeyid signature expires", "security-token"),
        ("accesskeyid signature expires", "x-obs-security-token"),
        # Amazon CloudFront Developer Guide, "Use signed URLs": canned and custom policies
        ("key-pair-id signature", "expires policy hash-algorithm"),
        # Azure Storage, "Create a service SAS", "… an account SAS", "… a user delegation SAS"
        (
            "sig sv",
            "ss srt sr st se sp sip spr si sdd ses saoid suoid scid skoid sktid skt ske sks skv",
        ),
        # Alibaba OSS, signature version 4. x-oss-process is not listed: it changes the bytes.
        (
            "x-oss-signature",
            "x-oss-signature-version x-oss-credential x-oss-date x-oss-expires x-oss-additional-headers "
            "x-oss-security-token",
        ),
        # Tencent COS, "Request Signature"
        (
            "q-signature",
            "q-sign-algorithm q-ak q-sign-time q-key-time q-header-list q-url-param-list x-cos-security-token",
        ),
    )
)

#: Parameters that authorise a request by themselves.
_TOKENS = frozenset(
    ("access_token", "auth_token", "private_token", "job_token", "token", "api_key", "api-key", "apikey", "jwt")
)


#: Another parameter after a semicolon.
_NEXT_PARAMETER = re.compile(r";[^=;]+=")


def without_signature(query: str) -> str:
    """Return a query without the parameters that sign or authorise the request. The others keep their bytes and order.

    For some servers a semicolon separates parameters: ``token=x;file=a`` is kept, because it names a file there. A name
    without a value is kept, too: ``?token`` may be a file of that name.
    """
    if not query:
        return query
    pieces = query.split("&")
    names = [unquote_plus(piece.partition("=")[0]).lower() for piece in pieces]
    is_one_value = ["=" in piece and not _NEXT_PARAMETER.search(piece) for piece in pieces]
    left_out = set(_TOKENS)
    for required, all_names in _SIGNED_QUERIES:
        if required.issubset(names):
            left_out |= all_names
    kept = (not (is_one and name in left_out) for name, is_one in zip(names, is_one_value, strict=True))
    return "&".join(itertools.compress(pieces, kept))


def grants_folder(query: str) -> bool:
    """Return whether a query is an Azure shared access signature for a container, a directory or an account.

    See ``sr`` and ``srt`` in learn.microsoft.com, "Create a service SAS" and "Create an account SAS".
    """
    parameters = dict(parse_qsl(query))
    return "sig" in parameters and (parameters.get("sr") in ("c", "d") or "o" in parameters.get("srt", ""))
