"""Which digests must hold, and whether they do."""

from __future__ import annotations

from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.origin import Claim
from rankload.errors import DigestMismatchError


def claims_of(request: FetchRequest, *others: Claim | None) -> tuple[Claim, ...]:
    """Return all that is said about the file's digest, the strongest first.

    Args:
        request: has what the caller expects.
        others: what the origin says.
    """
    given = Claim(request.sha256, request.sha256_source) if request.sha256 else None
    named = Claim(request.hash_prefix, "hash_prefix") if request.hash_prefix else None
    return tuple(claim for claim in (given, *others, named) if claim is not None)


def check_digest(sha256: str, claims: tuple[Claim, ...], origin: str) -> str | None:
    """Compare a digest with what is claimed, and return whose claim vouches for it; None if there is none.

    Raises:
        DigestMismatchError: in torch.hub's words, then where and what to do.
    """
    for claim in claims:
        if not sha256.startswith(claim.sha256):
            raise DigestMismatchError(
                f'invalid hash value (expected "{claim.sha256}", got "{sha256}"): {origin} is damaged, was replaced, '
                f"or what is expected ({claim.source}) is another file's digest",
                expected=claim.sha256,
                got=sha256,
                url=origin,
                source=claim.source,
            )
    return claims[0].source if claims else None


def satisfies(sha256: str | None, request: FetchRequest) -> bool:
    """Return whether a known digest is what the request expects; an unknown one satisfies no expectation."""
    claims = claims_of(request)
    return not claims or (sha256 is not None and all(sha256.startswith(claim.sha256) for claim in claims))
