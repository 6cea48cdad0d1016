"""What the nodes tell one another about a file: what each has, and the plan. Pure.

Everything travels as JSON through the job's store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankload._fetch.exchange.plan import ExchangePlan, RingMember, make_plan
from rankload._fetch.origins.origin import Claim, Version


@dataclass(frozen=True)
class Offer:
    """What a node has of a file, or what the origin told it.

    Attributes:
        is_alone: whether the node fetches, or uses, the file for itself.
        has_file: whether it has the whole file, verified.
        version: the file's version; None if the node has no file, and does not reach the origin.
    """

    is_alone: bool = False
    has_file: bool = False
    version: Version | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the offer for the store."""
        return {"is_alone": self.is_alone, "has_file": self.has_file, "version": _version_as_json(self.version)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Offer:
        """Return the offer that another node posted."""
        return cls(value["is_alone"], value["has_file"], _version_from_json(value["version"]))


def members_of(offers: dict[int, Offer], version: Version) -> list[RingMember]:
    """Return the nodes that take part: those with this version of the file, and those that know of none."""
    return [
        RingMember(rank, may_fetch=offer.version is not None and not offer.has_file)
        for rank, offer in offers.items()
        if not offer.is_alone and (offer.version is None or _is_same(offer.version, version))
    ]


def _is_same(one: Version, other: Version) -> bool:
    """Return whether two descriptions are certainly of one version."""
    if one.size_bytes != other.size_bytes:
        return False
    if one.claim and other.claim:
        return one.claim.sha256 == other.claim.sha256
    return one.etag is not None and one.etag == other.etag


def _version_as_json(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    claim = {"sha256": version.claim.sha256, "source": version.claim.source} if version.claim else None
    return {
        "size_bytes": version.size_bytes,
        "etag": version.etag,
        "last_modified": version.last_modified,
        "claim": claim,
        "content_type": version.content_type,
    }


def _version_from_json(value: dict[str, Any] | None) -> Version | None:
    if value is None:
        return None
    return Version(**{**value, "claim": Claim(**value["claim"]) if value["claim"] else None})


def plan_as_json(plan: ExchangePlan | None, version: Version | None, secret: bytes) -> dict[str, Any]:
    """Return a plan for the store; without a plan, nodes fetch for themselves."""
    if plan is None:
        return {"members": None}
    members = [[member.rank, bool(member.held), member.may_fetch] for member in plan.members]
    return {
        "members": members,
        "unit_bytes": plan.unit_bytes,
        "version": _version_as_json(version),
        "secret": secret.hex(),
    }


def plan_from_json(value: dict[str, Any]) -> tuple[ExchangePlan | None, Version | None, bytes]:
    """Return the plan that the first leader posted, the file's version, and the key that authenticates units."""
    if value["members"] is None:
        return None, None, b""
    version = _version_from_json(value["version"])
    assert version is not None and version.size_bytes is not None
    units = frozenset(range(-(-version.size_bytes // value["unit_bytes"])))
    members = [RingMember(rank, units if has else frozenset(), may) for rank, has, may in value["members"]]
    return make_plan(version.size_bytes, value["unit_bytes"], members), version, bytes.fromhex(value["secret"])
