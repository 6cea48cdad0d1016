"""What the nodes tell one another about a file before they exchange it: what each has, and the plan. Pure.

Everything travels as JSON through the job's store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankload._fetch.exchange.plan import ExchangePlan, count_units, make_plan, unit_bytes_for, units_within
from rankload._fetch.origins.origin import Claim, Version

#: Most ranges of an offer: a value in the store is small. Of a file in more pieces, the largest are offered.
_MAX_SPANS = 1000


@dataclass(frozen=True)
class Offer:
    """What a node has of a file, or what the origin told it.

    Attributes:
        is_alone: whether the node fetches, or uses, the file for itself.
        comes_later: whether it is alone now, but has the file for the others when it has fetched it.
        has_file: whether it has the whole file, verified.
        may_try: whether it may ask the origin.
        may_fetch: whether it reaches the origin.
        may_split: whether the origin sends ranges, and other nodes can tell whether theirs are of the same version.
        version: the file's version; None if the node has nothing of it, and does not reach the origin.
        url_key: key of the URL that the version is of; None if unknown.
        spans: ranges of bytes that it has.
    """

    is_alone: bool = False
    comes_later: bool = False
    has_file: bool = False
    may_try: bool = False
    may_fetch: bool = False
    may_split: bool = False
    version: Version | None = None
    url_key: str | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the origin is reached, but serves only the whole file."""
        return self.may_fetch and not self.may_split

    def is_of(self, version: Version, url_key: str | None) -> bool:
        """Return whether the offer is certainly of a URL's version."""
        return self.version is not None and is_same(self.version, version, is_same_url=self.url_key == url_key)

    @property
    def may_others_ask(self) -> bool:
        """Whether other nodes should ask the origin, too, when the first leader has made this offer."""
        return not (self.is_alone or self.is_whole)

    def as_json(self) -> dict[str, Any]:
        """Return the offer for the store."""
        largest = sorted(self.spans, key=lambda span: span[0] - span[1])[:_MAX_SPANS]
        return {**vars(self), "version": _version_as_json(self.version), "spans": largest}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Offer:
        """Return the offer that another node posted."""
        spans = tuple((begin, end) for begin, end in value["spans"])
        return cls(**{**value, "version": _version_from_json(value["version"]), "spans": spans})


@dataclass(frozen=True)
class Exchange:
    """An exchange that the nodes have agreed on.

    Attributes:
        plan: which node fetches what.
        version: version of the file.
        secret: key that authenticates units.
        url_key: key of the URL that the version is of; None if unknown.
    """

    plan: ExchangePlan
    version: Version
    secret: bytes
    url_key: str | None = None

    def held(self, offer: Offer) -> frozenset[int]:
        """Return the units of this version that a node has."""
        if not offer.is_of(self.version, self.url_key):
            return frozenset()
        return units_within(offer.spans, self.plan.size_bytes, self.plan.unit_bytes)

    def version_for(self, offer: Offer) -> Version | None:
        """Return this version as the origin describes it that a node reaches; None if it reaches none with it.

        Mirrors have other validators for the same file.
        """
        if not offer.may_fetch or offer.version is None or not offer.is_of(self.version, self.url_key):
            return None
        return replace(offer.version, claim=self.version.claim)


@dataclass(frozen=True)
class Agreed:
    """What the nodes do about a file. If nothing is agreed, each node fetches it for itself.

    Attributes:
        exchange: the exchange; None if there is none.
        fetcher: rank that fetches the file for itself now, and then has it for the others; None if nobody does.
    """

    exchange: Exchange | None = None
    fetcher: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the agreement for the store."""
        if (found := self.exchange) is None:
            return {"fetcher": self.fetcher, "plan": None}
        version, secret = _version_as_json(found.version), found.secret.hex()
        exchange = {"plan": vars(found.plan), "version": version, "secret": secret, "url_key": found.url_key}
        return {"fetcher": None, **exchange}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Agreed:
        """Return the agreement that the first leader posted."""
        if (plan := value["plan"]) is None:
            return cls(fetcher=value["fetcher"])
        missing = tuple((first, last) for first, last in plan["missing"])
        tuples = {"ranks": tuple(plan["ranks"]), "fetchers": tuple(plan["fetchers"]), "missing": missing}
        version = _version_from_json(value["version"])
        assert version is not None
        secret = bytes.fromhex(value["secret"])
        return cls(Exchange(ExchangePlan(**{**plan, **tuples}), version, secret, value["url_key"]))


def agreement_on(offers: Mapping[int, Offer], secret: bytes, chunk_bytes: int) -> Agreed:
    """Return what the nodes do about a file.

    Args:
        offers: offer of each leader, that of the first leader first. If that one stays alone, so do all.
        secret: key that authenticates units.
        chunk_bytes: about the size of a request to the origin.
    """
    (first_rank, first), *_ = offers.items()
    others = {rank: offer for rank, offer in offers.items() if not offer.is_alone}
    if first.is_alone:
        is_awaited = first.comes_later and not all(offer.has_file for offer in others.values())
        return Agreed(fetcher=first_rank) if is_awaited else Agreed()
    if len(others) < 2:
        return Agreed()
    told = [offer for offer in others.values() if offer.version]
    sure = [offer for offer in told if offer.may_fetch or offer.has_file]  # the rest of a download may be of an old one
    chosen = first if first.has_file else next(iter(sure or told), None)
    if chosen is None or chosen.version is None:  # the origin is out of order at the moment: one node tries for longer
        return Agreed(fetcher=next((rank for rank, offer in others.items() if offer.may_try), None))
    members = {rank: offer for rank, offer in others.items() if _takes_part(offer, chosen, is_firsts=first.has_file)}
    claims = (offer.version.claim for offer in members.values() if offer.version is not None)
    version = replace(chosen.version, claim=next(filter(None, claims), None))
    if (plan := _plan(members, version, chosen.url_key, chunk_bytes)) is not None:
        return Agreed(Exchange(plan, version, secret, chosen.url_key))
    whole = [rank for rank, offer in others.items() if offer.is_whole]
    return Agreed(fetcher=whole[0]) if whole and not any(offer.may_split for offer in others.values()) else Agreed()


def is_same(one: Version, other: Version, *, is_same_url: bool) -> bool:
    """Return whether two descriptions are certainly of one version. A date is not enough: parts of two would mix.

    An ETag says that only of the versions at one URL: a mirror may give its own file the ETag of another URL's.
    """
    if one.size_bytes != other.size_bytes:
        return False
    if one.claim and other.claim:
        return one.claim.sha256 == other.claim.sha256
    return is_same_url and one.etag is not None and one.etag == other.etag


def _takes_part(offer: Offer, chosen: Offer, *, is_firsts: bool) -> bool:
    """Return whether a node can use what others have of the version of the chosen offer.

    All nodes need the version that the first leader has. If that one has none yet, a node cannot if it has another
    version, or is offered one.
    """
    assert chosen.version is not None
    is_other = offer.version is not None and not offer.is_of(chosen.version, chosen.url_key)
    return not (is_other and (offer.has_file or (offer.may_fetch and not is_firsts)))


def _plan(members: Mapping[int, Offer], version: Version, url_key: str | None, chunk_bytes: int) -> ExchangePlan | None:
    """Return the plan for an exchange; None if it is not possible, or nobody needs one."""
    size_bytes = version.size_bytes
    if not size_bytes or len(members) < 2 or all(offer.has_file for offer in members.values()):
        return None
    unit_bytes, held = unit_bytes_for(size_bytes, chunk_bytes), set[int]()
    for offer in members.values():
        if offer.is_of(version, url_key):
            held |= units_within(offer.spans, size_bytes, unit_bytes)
    missing = [unit for unit in range(count_units(size_bytes, unit_bytes)) if unit not in held]
    fetchers = [rank for rank, offer in members.items() if offer.may_split and offer.is_of(version, url_key)]
    return make_plan(size_bytes, unit_bytes, chunk_bytes, tuple(members), fetchers, missing)


def _version_as_json(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    claim = version.claim and {"sha256": version.claim.sha256, "source": version.claim.source}
    return {**vars(version), "claim": claim}


def _version_from_json(value: dict[str, Any] | None) -> Version | None:
    if value is None:
        return None
    return Version(**{**value, "claim": Claim(**value["claim"]) if value["claim"] else None})
