"""The nodes of a call that fetch files together: what each has, who does what, and how they are connected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_read_errors
from rankload._cache.layout import Entry
from rankload._cache.lease import hold_lease
from rankload._coordination.call_context import CallContext
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.digests import check_digest
from rankload._fetch.download import download
from rankload._fetch.exchange.offers import Offer, members_of, plan_as_json, plan_from_json
from rankload._fetch.exchange.plan import ExchangePlan, RingMember, make_plan, unit_bytes_for
from rankload._fetch.exchange.receive import receive_in_ring
from rankload._fetch.exchange.ring import Ring, Served
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.lookup import CacheLookup, file_version, look_up, make_directories, set_damaged_file_aside
from rankload._fetch.mirrors import Received
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.origin import Claim, UnusableRange, Version
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.partials.partial import Partial
from rankload._formats.source import open_regular
from rankload._relay.addresses import own_addresses
from rankload._relay.links import Link, connect
from rankload._relay.listener import Listener
from rankload._relay.seal import new_key
from rankload._types import FetchedFile, Progress, Report
from rankload._urls import Url
from rankload.errors import ContentChangedError, FetchError

_logger = logging.getLogger("rankload")

#: Fetches a file for this node alone.
FetchAlone = Callable[[FetchRequest], FetchedFile]


class Peers:
    """The ranks that lead the domains of a call, each for its cache directory.

    Args:
        leaders: these ranks, the same list on all of them.
        call: context of the call.
    """

    def __init__(self, leaders: Sequence[int], call: CallContext) -> None:
        self._leaders, self._call, self._channel = list(leaders), call, call.channel
        self._rank, self._number = call.identity.rank, 0

    def fetch(self, request: FetchRequest, fetch_alone: FetchAlone) -> FetchedFile:
        """Fetch a file together with the other nodes, or alone where that is not possible. Collective over the leaders.

        Raises:
            RankloadError: any error of a fetch, or another rank's.
        """
        key = f"exchange/{self._number}"
        self._number += 1
        with ExitStack() as stack:
            offer, lookup, url = self._offer(request, stack)
            self._channel.post(f"{key}/{self._rank}", offer.as_json())
            plan, version, secret = self._agreed_plan(key, request)
            ranks = [member.rank for member in plan.members] if plan else []
            if plan is not None and version is not None and self._rank in ranks:
                member = ranks.index(self._rank)
                _logger.info(
                    "%s: %d nodes exchange it; this one fetches %d of %d bytes", request.url, len(ranks),
                    sum(end - begin for begin, end in map(plan.span, plan.fetched_by(member))), plan.size_bytes,
                )  # fmt: skip
                upstream, downstream = self._connected(key, ranks, member)
                ring = Ring(plan, member, version, upstream, downstream, secret)
                watch = self._channel.watch_over({upstream.rank, downstream.rank})
                if lookup is not None and lookup.file is not None:
                    self._serve(lookup.file, ring, watch)
                elif lookup is not None:
                    return self._download(key, ring, url, lookup, request, watch)
        return fetch_alone(request)

    def check_same_index(self, index: FetchedFile) -> None:
        """Check that all nodes have the same index: the parts that it names are then fetched in one order.

        Raises:
            ContentChangedError: this node's index is another one than the first leader's.
        """
        key, sha256 = f"exchange/index/{self._number}", index.sha256
        if sha256 is None:
            sha256 = sha256_of_file(index.path, lambda _: None)
        if self._rank == self._leaders[0]:
            self._channel.post(key, {"sha256": sha256})
        elif self._channel.wait_for(key, from_rank=self._leaders[0])["sha256"] != sha256:
            raise ContentChangedError(
                f"{index.path}: rank {self._leaders[0]} has another index of this checkpoint: pass refresh=True to get "
                "the origin's present files on all nodes, or sha256= to choose one",
                path=str(index.path),
            )

    def _offer(self, request: FetchRequest, stack: ExitStack) -> tuple[Offer, CacheLookup | None, Url]:
        """Look what this node has; if nothing, take the lease and ask the origin."""
        alone = Offer(is_alone=True), None, request.url
        if request.refresh or request.sidecar or request.offline or request.hub_file is not None:
            return alone
        report, settings = self._call.report, self._call.settings
        make_directory(request.directory)
        entry = Entry(request.directory / request.file_name, request.directory)
        make_directories(entry)
        lookup = look_up(entry, request, report)
        if lookup.file is not None:
            if lookup.is_unvouched or lookup.file.sha256 is None:
                return alone
            claim = Claim(lookup.file.sha256, "another node's file")
            etag = lookup.record.etag if lookup.record else None
            return (
                Offer(has_file=True, version=Version(lookup.file.size_bytes, etag, claim=claim)),
                lookup,
                request.url,
            )
        has_lease = stack.enter_context(
            hold_lease(lookup.entry.lease_path, settings, progress_mark=lambda: 0, on_wait=lambda: True)
        )
        if not has_lease or file_version(lookup.entry) != lookup.version:  # another job fetches it, or has
            return alone
        set_damaged_file_aside(lookup)
        for url in request.urls:
            with closing(origin_for(url, headers_of(request, url), settings)) as origin:
                try:
                    once = replace(settings, retries=0)
                    answer = read_bounded(origin, 0, 1, None, most_bytes=1, settings=once, report=report)
                except (FetchError, UnusableRange) as error:
                    _logger.info("%s; receiving the file from other nodes, if they reach it", error)
                    continue
            if answer.is_whole or not answer.version.size_bytes or not answer.version.has_validator:
                return alone  # parts of it could not be told apart
            return Offer(version=answer.version), lookup, url
        return Offer(), lookup, request.url

    def _agreed_plan(self, key: str, request: FetchRequest) -> tuple[ExchangePlan | None, Version | None, bytes]:
        """Return the plan that the first leader makes of all offers."""
        if self._rank != self._leaders[0]:
            return plan_from_json(self._channel.wait_for(f"{key}/plan", from_rank=self._leaders[0]))
        offers = {
            rank: Offer.from_json(self._channel.wait_for(f"{key}/{rank}", from_rank=rank)) for rank in self._leaders
        }
        version = offers[self._rank].version or next(
            (offer.version for offer in offers.values() if offer.version), None
        )
        members = [] if version is None or offers[self._rank].is_alone else members_of(offers, version)
        plan, secret = None, new_key()
        if version is not None and version.size_bytes and any(not offers[member.rank].has_file for member in members):
            unit_bytes = unit_bytes_for(version.size_bytes, self._call.settings.chunk_bytes)
            units = frozenset(range(-(-version.size_bytes // unit_bytes)))
            held = [replace(one, held=units if offers[one.rank].has_file else frozenset()) for one in members]
            plan = make_plan(version.size_bytes, unit_bytes, held) if len(held) > 1 else None
        self._channel.post(f"{key}/plan", plan_as_json(plan, version, secret))
        return plan, version, secret

    def _connected(self, key: str, ranks: list[int], member: int) -> tuple[Link, Link]:
        """Connect to the neighbours. The first member connects first, and accepts last."""
        before, after = ranks[member - 1], ranks[(member + 1) % len(ranks)]
        watch = self._channel.watch_over({before, after})

        def look_around() -> None:
            watch(Progress("connecting"))

        with closing(Listener(own_addresses(self._channel.store_host))) as listener:
            way = {"way": listener.way, "host": self._channel.identity.host}
            self._channel.post(f"{key}/way/{self._rank}", way)
            ways = {rank: self._channel.wait_for(f"{key}/way/{rank}", from_rank=rank) for rank in {before, after}}

            def reach() -> Link:
                seconds, to = self._call.settings.connect_seconds, ways[after]
                link = connect(after, to["host"], to["way"], seconds, look_around)
                self._channel.on_exit(link.socket.close)
                return link

            downstream = reach() if member == 0 else None
            upstream = listener.accept(before, ways[before]["host"], look_around)
            self._channel.on_exit(upstream.socket.close)
            return upstream, downstream or reach()

    def _serve(self, file: FetchedFile, ring: Ring, report: Report) -> None:
        """Send this node's file to the next node."""
        with wrap_read_errors(file.path), open_regular(file.path) as opened:
            served = Served(opened.fileno())
            try:
                ring.start_serving(served)
                ring.finish(served, report, self._call.settings.progress_seconds)
            finally:
                ring.stop()

    def _download(
        self, key: str, ring: Ring, url: Url, lookup: CacheLookup, request: FetchRequest, report: Report
    ) -> FetchedFile:
        settings = self._call.settings

        def receive(partial: Partial) -> Received:
            received = receive_in_ring(ring, url, request, partial, report, settings)
            _logger.info("%s: %d bytes came from other nodes", request.url, ring.bytes_received)
            if ring.version.claim is None:
                self._compare(key, received, ring.plan.members)
            return received

        return download(request, lookup.entry, report, settings, receive)

    def _compare(self, key: str, received: Received, members: Sequence[RingMember]) -> None:
        """Compare the digest with the first node's: the origin has given none.

        Raises:
            DigestMismatchError: they differ.
        """
        first = members[0].rank
        if self._rank == first:
            self._channel.post(f"{key}/digest", {"sha256": received.sha256})
        else:
            digest = self._channel.wait_for(f"{key}/digest", from_rank=first)["sha256"]
            check_digest(received.sha256, (Claim(digest, f"rank {first}'s bytes"),), received.url.display_name)
