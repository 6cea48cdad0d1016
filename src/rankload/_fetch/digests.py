"""Collect the digests that a file must have, and check them."""

from __future__ import annotations

from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.origin import Claim
from rankload.errors import DigestMismatchError

#: Sources under the names that callers know.
_SHOWN = {"hash_prefix": "the file name, under check_hash"}


def claims_of(request: FetchRequest, *others: Claim | None) -> tuple[Claim, ...]:
    """Return all claims about the file's digest, the strongest first.

    Args:
        request: request with the caller's expectations.
        others: claims of the origin.
    """
    given = Claim(request.sha256, request.sha256_source) if request.sha256 else None
    named = Claim(request.hash_prefix, "hash_prefix") if request.hash_prefix else None
    return tuple(claim for claim in (given, *others, named) if claim is not None)


def check_digest(sha256: str, claims: tuple[Claim, ...], origin: str) -> str | None:
    """Compare a digest with all claims; return the source of the strongest claim, or None without claims.

    Raises:
        DigestMismatchError: a claim differs. The message begins with torch.hub's.
    """
    for claim in claims:
        if not sha256.startswith(claim.sha256):
            raise DigestMismatchError(
                f'invalid hash value (expected "{claim.sha256}", got "{sha256}"): {origin} is damaged or was replaced, '
                f"or the expected digest ({_SHOWN.get(claim.source, claim.source)}) is that of another file",
                expected=claim.sha256,
                got=sha256,
                url=origin,
                source=claim.source,
            )
    return claims[0].source if claims else None


def satisfies(sha256: str | None, request: FetchRequest) -> bool:
    """Return whether a digest meets all expectations of the request. An unknown digest (None) meets none."""
    claims = claims_of(request)
    return not claims or (sha256 is not None and all(sha256.startswith(claim.sha256) for claim in claims))
