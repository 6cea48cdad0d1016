"""Which digest must hold, and whether it does."""

from __future__ import annotations

from rankload._errors import DigestMismatchError
from rankload._types import FetchRequest


def check_digest(sha256: str, request: FetchRequest, origin: str) -> None:
    """Compare a digest with what the request expects, if it expects one.

    Raises:
        DigestMismatchError: in torch.hub's words, then where and what to do.
    """
    for expected in filter(None, (request.sha256, request.hash_prefix)):
        if not sha256.startswith(expected):
            raise DigestMismatchError(
                f'invalid hash value (expected "{expected}", got "{sha256}"): {origin} is damaged, was replaced, or '
                "the expected digest is another file's; nothing was kept",
                expected=expected,
                got=sha256,
                url=origin,
            )


def satisfies(sha256: str | None, request: FetchRequest) -> bool:
    """Tell whether a known digest is what the request expects; an unknown one satisfies no expectation."""
    expected = [digest for digest in (request.sha256, request.hash_prefix) if digest]
    return not expected or (sha256 is not None and all(sha256.startswith(digest) for digest in expected))


def vouching_digest(request: FetchRequest) -> str | None:
    """Name the strongest digest that the request compares with."""
    if request.sha256:
        return "sha256"
    return "hash_prefix" if request.hash_prefix else None
