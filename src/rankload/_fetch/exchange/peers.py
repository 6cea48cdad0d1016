"""The nodes of a call that fetch files together, and a node's part in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from rankload._cache.files import wrap_read_errors
from rankload._cache.layout import Entry
from rankload._cache.record import Record, find_record
from rankload._coordination.call_context import CallContext
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.exchange.first_answer import first_answer
from rankload._fetch.exchange.neighbours import connect_ring, try_to_connect_ring
from rankload._fetch.exchange.offers import Agreed, Exchange, Offer, agreement_on, is_same
from rankload._fetch.exchange.plan import ExchangePlan
from rankload._fetch.exchange.receive import receive_in_ring
from rankload._fetch.exchange.ring import Ring, Served
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.mirrors import Received
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.origin import Claim, UnusableRange, Version
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.partials.partial import Partial
from rankload._formats.source import open_regular
from rankload._relay.seal import new_key
from rankload._types import FetchedFile, Report
from rankload._urls import Url
from rankload.errors import ContentChangedError, DigestMismatchError, FetchError, RankloadError

_logger = logging.getLogger("rankload")


class Peers:
    """The ranks that lead the domains of a call, each for its cache directory.

    Args:
        leaders: these ranks, the same list on all of them.
        call: context of the call.
        is_required: whether nodes that cannot be connected are an error; else each then fetches for itself.

    Attributes:
        received_bytes: bytes of all files so far that came from other nodes.
        is_connected: whether the nodes could be connected for all files so far.
    """

    def __init__(self, leaders: Sequence[int], call: CallContext, *, is_required: bool) -> None:
        self.leaders, self.call, self.is_required = list(leaders), call, is_required
        self._number = self.received_bytes = 0
        self.is_connected = True

    def next_file(self) -> Share:
        """Return this node's part in the next file. Every leader calls this for the same files in the same order."""
        self._number += 1
        return Share(f"exchange/{self._number}", self)

    def check_same_index(self, index: FetchedFile) -> None:
        """Check that all nodes have the same index: the parts that it names are then fetched in one order.

        Raises:
            ContentChangedError: this node's index is another one than the first leader's.
        """
        key, sha256, channel = f"exchange/index/{self._number}", index.sha256, self.call.channel
        if sha256 is None:
            sha256 = sha256_of_file(index.path, lambda _: None)
        if self.call.identity.rank == self.leaders[0]:
            channel.post(key, {"sha256": sha256})
        elif channel.wait_for(key, from_rank=self.leaders[0])["sha256"] != sha256:
            raise ContentChangedError(
                f"{index.path}: rank {self.leaders[0]} has another index of this checkpoint: pass refresh=True to get "
                "the origin's present files on all nodes, or sha256= to choose one",
                path=str(index.path),
            )


class Share:
    """A node's part in one file: it has the file, receives the file, or stays out.

    The first call of `serve`, `stay_out` or `receive` counts: it is collective over the leaders. `finish` ends the
    part.

    Args:
        key: key of the file in the call.
        peers: the nodes.

    Attributes:
        has_begun: whether one of these methods has been called.
        has_failed: whether an exchange has begun and failed: the other nodes cannot go on.
    """

    def __init__(self, key: str, peers: Peers) -> None:
        self._key, self._peers, self._call, self._channel = key, peers, peers.call, peers.call.channel
        self.has_begun = self._is_first_fetcher = self.has_failed = False
        self._rank = peers.call.identity.rank
        self._others = peers.leaders  # those that have not stayed out

    def first_answer(self, ask: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
        """Return one node's answer to a question about this file (see `first_answer`). This does not begin the part."""
        return first_answer(f"{self._key}/answer", self._peers.leaders, self._channel, ask)

    def serve(self, file: FetchedFile, record: Record | None) -> None:
        """Offer a file that this node has, and send it to the nodes that lack it.

        Args:
            file: the file.
            record: its record.

        Raises:
            RankloadError: any error of the exchange, or another rank's.
        """
        if not self.has_begun:
            self._serve(self._key, file, record)

    def stay_out(self) -> None:
        """Leave this file to the other nodes. The first leader has it for them in `finish`."""
        if not self.has_begun:
            agreed = self._agree(self._key, Offer(is_alone=True, comes_later=True))
            self._is_first_fetcher = agreed.fetcher == self._rank

    def receive(self, partial: Partial, request: FetchRequest) -> Received | None:
        """Fill a partial file together with the other nodes. It may have bytes of an earlier download.

        Returns:
            What has come; None if this node must fetch the file for itself.

        Raises:
            RankloadError: any error of the exchange, or another rank's.
        """
        if self.has_begun:
            return None
        key, first = self._key, self._peers.leaders[0]
        url, offer = request.url, Offer()
        # an origin that sends no ranges would begin to send the file to every node that asks
        if self._rank == first or self._offer_of(key, first).may_others_ask:
            url, offer = self._ask_origin(partial, request)
        agreed = self._agree(key, offer)
        if agreed.fetcher == self._rank:
            self._is_first_fetcher = True
            return None
        if agreed.fetcher is not None:
            _logger.info("%s: waiting for rank %d, which fetches it for all", request.url, agreed.fetcher)
            key, offer = f"{key}/again", Offer()
            agreed = self._agree(key, offer)
        if (exchange := self._own(agreed)) is None:
            return None
        if exchange.version_for(offer) is None:  # this node fetches nothing: the file is that of the others' URL
            url = next((one for one in request.urls if one.key == exchange.url_key), url)
        try:
            if partial.content is not None and not exchange.held(offer):
                partial.clear()
            return self._receive(key, exchange, offer, url, partial, request)
        except BaseException:
            self.has_failed = True
            raise

    def finish(self, file: FetchedFile) -> None:
        """End this node's part: it has the file, from wherever."""
        self.stay_out()
        if self._is_first_fetcher:
            with wrap_read_errors(file.path):
                found = find_record(Entry(file.path).record_path)
            self._serve(f"{self._key}/again", file, found.record if found is not None else None)

    def _serve(self, key: str, file: FetchedFile, record: Record | None) -> None:
        offer = Offer(is_alone=True)  # nobody could verify a file without a digest
        if file.sha256 is not None:
            etag, last_modified = (record.etag, record.last_modified) if record is not None else (None, None)
            is_as_sidecar_says = record is not None and record.vouched_by == "sidecar"
            claim = Claim(file.sha256, "sidecar" if is_as_sidecar_says else "another node's file")
            version = Version(file.size_bytes, etag, last_modified, claim)
            url_key = record.url_key if record is not None else None
            offer = Offer(has_file=True, version=version, url_key=url_key, spans=((0, file.size_bytes),))
        agreed = self._agree(key, offer)
        if agreed.fetcher is not None:
            self._agree(f"{key}/again", Offer(is_alone=True))
        exchange = self._own(agreed)
        if exchange is None or (ring := self._ring(key, exchange, offer)) is None:
            return
        with wrap_read_errors(file.path), open_regular(file.path) as opened:
            try:
                ring.start_serving(Served(opened.fileno()))
                ring.finish(self._watch(exchange.plan), self._call.settings.progress_seconds)
            finally:
                ring.stop()

    def _ask_origin(self, partial: Partial, request: FetchRequest) -> tuple[Url, Offer]:
        """Return what this node has and gets, and from where."""
        content, spans = partial.content, tuple(partial.spans)
        for url in () if request.offline or request.needs_sidecar else request.urls:
            with closing(origin_for(url, headers_of(request, url), self._call.settings)) as origin:
                try:
                    once = replace(self._call.settings, retries=0)
                    report = self._call.report
                    answer = read_bounded(origin, 0, 1, None, most_bytes=1, settings=once, report=report)
                except (FetchError, UnusableRange) as error:
                    if isinstance(error, RankloadError) and error.is_from_another_rank:
                        raise
                    _logger.info("%s; receiving the file from other nodes, if they reach it", error)
                    continue
            version = answer.version
            if request.sha256 is not None and request.sha256_source == "sidecar":  # other nodes may not reach it
                version = replace(version, claim=Claim(request.sha256, "sidecar"))
            if content is None or not is_same(content.version, version, is_same_url=content.url_key == url.key):
                spans = ()
            may_split = not answer.is_whole and bool(version.size_bytes) and is_same(version, version, is_same_url=True)
            return url, Offer(
                may_try=True, may_fetch=True, may_split=may_split, version=version, url_key=url.key, spans=spans
            )
        offer = Offer(may_try=not request.offline)
        if content is not None:
            offer = replace(offer, version=content.version, url_key=content.url_key, spans=spans)
        return request.url, offer

    def _agree(self, key: str, offer: Offer) -> Agreed:
        """Return what the first leader decides once all have made their offers."""
        self.has_begun, channel, first = True, self._channel, self._peers.leaders[0]
        channel.post(f"{key}/{self._rank}", offer.as_json())
        if self._rank != first:
            return Agreed() if offer.is_alone else Agreed.from_json(channel.wait_for(f"{key}/plan", from_rank=first))
        offers = {first: offer}
        if not offer.is_alone or offer.comes_later:
            offers |= {rank: self._offer_of(key, rank) for rank in self._others if rank != first}
            self._others = [rank for rank in offers if not offers[rank].is_alone]
        agreed = agreement_on(offers, new_key(), self._call.settings.chunk_bytes)
        channel.post(f"{key}/plan", agreed.as_json())
        return agreed

    def _offer_of(self, key: str, rank: int) -> Offer:
        return Offer.from_json(self._channel.wait_for(f"{key}/{rank}", from_rank=rank))

    def _own(self, agreed: Agreed) -> Exchange | None:
        """Return the exchange in which this node takes part; None if it does not."""
        exchange = agreed.exchange
        return exchange if exchange is not None and self._rank in exchange.plan.ranks else None

    def _ring(self, key: str, exchange: Exchange, offer: Offer) -> Ring | None:
        """Return this node's place in the ring; None if the nodes cannot be connected."""
        plan, channel, seconds = exchange.plan, self._channel, self._call.settings.connect_seconds
        member = plan.ranks.index(self._rank)
        if self._peers.is_required:
            links = connect_ring(key, plan.ranks, channel, seconds)
        elif (found := try_to_connect_ring(key, plan.ranks, channel, seconds)) is not None:
            links = found
        else:
            self._peers.is_connected = False
            return None
        after = plan.ranks[plan.next(member)]
        held_after = exchange.held(self._offer_of(key, after))
        own_version = exchange.version_for(offer)
        may_catch_up = own_version is not None and offer.may_split and not self._peers.is_required
        return Ring(
            plan, member, own_version or exchange.version, exchange.held(offer), held_after, links, exchange.secret,
            may_catch_up=may_catch_up,
        )  # fmt: skip

    def _receive(
        self, key: str, exchange: Exchange, offer: Offer, url: Url, partial: Partial, request: FetchRequest
    ) -> Received | None:
        plan = exchange.plan
        if (ring := self._ring(key, exchange, offer)) is None:
            return None
        text = "%s: %d nodes exchange it; this one has %d of %d bytes, and fetches %d units of %d bytes"
        counts = partial.spans.total_bytes, plan.size_bytes, len(ring.own_units), plan.unit_bytes
        _logger.info(text, request.url, len(plan.ranks), *counts)
        received = receive_in_ring(
            ring, url, request, partial, self._watch(plan), self._call.settings,
            lambda: self._channel.any_backs_off(plan.ranks),
        )  # fmt: skip
        text = "%s: %d bytes came from other nodes, %d from the origin because the other nodes are slower"
        _logger.info(text, request.url, ring.received_bytes, ring.extra_bytes)
        self._peers.received_bytes += ring.received_bytes
        if exchange.version.claim is None:
            try:
                self._compare(f"{key}/digest", received, plan.ranks)
            except DigestMismatchError:  # also another rank's: the next download must not begin with these bytes
                partial.clear()
                raise
        return received

    def _watch(self, plan: ExchangePlan) -> Report:
        member = plan.ranks.index(self._rank)
        return self._channel.watch_over({plan.ranks[member - 1], plan.ranks[plan.next(member)]})

    def _compare(self, key: str, received: Received, ranks: Sequence[int]) -> None:
        """Compare the digests of all nodes before any of them publishes: the origin has given none.

        Raises:
            DigestMismatchError: they differ. Which node's bytes are wrong is not known.
        """
        first, channel = ranks[0], self._channel
        channel.post(f"{key}/{self._rank}", {"sha256": received.sha256})
        if self._rank == first:
            found = {channel.wait_for(f"{key}/{rank}", from_rank=rank)["sha256"] for rank in ranks}
            channel.post(key, {"sha256": sorted(found)})
        digests = channel.wait_for(key, from_rank=first)["sha256"]
        if len(digests) > 1:
            other = next(digest for digest in digests if digest != received.sha256)
            display_name = received.url.display_name
            raise DigestMismatchError(
                f"{display_name}: the nodes have put together different files (SHA-256 {', '.join(digests)}): one of "
                "them had wrong bytes of an earlier download. Nothing was published; what each had is removed: make "
                "the call again",
                expected=other,
                got=received.sha256,
                url=display_name,
            )
