"""How the bytes of a body get into the file: read and written, or moved within the kernel where that can be done."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from rankload._errors import TruncatedError
from rankload._fetch.origins.origin import Body
from rankload._fetch.origins.splice import new_pipe
from rankload._fetch.transfer.first_request import Span
from rankload._fetch.transfer.target import Writer
from rankload._fetch.transfer.work import Work

#: Bodies from this length on are spliced. It costs the connection: nobody knows any more where its next answer begins.
#: A stream asks for so much at a time only where that comes within a second.
_LEAST_SPLICED_BYTES = 32 << 20

_SPLICE_BYTES = 1 << 20


class Passage:
    """One body's way into the file. Use as a context manager.

    Where origin, connection and disk allow, bytes go from the socket into the page cache by splice(2), without the two
    copies into this process and out of it; the hash reads them there. On two cores, which a fetch of 1 GB/s and its
    SHA-256 keep busy, that saves a quarter of the time.

    Args:
        body: where they come from.
        begin, end: the range that the body was admitted for; ``end`` is None where only the end of the body will tell.
        writer: where they go.
        work: told what was written.
    """

    def __init__(self, body: Body, begin: int, end: int | None, writer: Writer, work: Work) -> None:
        self._body, self._end, self._writer, self._work = body, end, writer, work
        self._closing = ExitStack()
        self._pipe: tuple[int, int] | None = None
        if end is not None and end - begin >= _LEAST_SPLICED_BYTES and body.can_splice and writer.can_splice:
            self._pipe = self._closing.enter_context(new_pipe(_SPLICE_BYTES))

    def move(self, span: Span) -> int:
        """Write the next bytes where a range begins, as far as it goes; return how many, 0 at the end of the body.

        Raises:
            FetchError: the body broke, no byte came in time, or more came than were promised or the caller allows.
            CacheError: the disk is full, or broken.
        """
        end = self._end if span.end is None or self._end is None else min(span.end, self._end)
        count = self._splice(span.begin, end)
        return self._copy(span.begin, end) if count is None else count

    def _copy(self, offset: int, end: int | None) -> int:
        piece = self._body.read()
        if self._end is not None and offset + len(piece) > self._end:
            shown = self._work.origin.shown
            raise TruncatedError(f"{shown}: more bytes came than were promised", url=shown, expected=self._end)
        if self._end is None:
            self._work.size_limit.check(self._work.origin.shown, offset + len(piece), is_announced=False)
        if end is not None and offset + len(piece) > end:
            piece = piece[: end - offset]
        if piece:
            self._writer.write(piece, offset)
            self._work.accept(offset, piece)
        return len(piece)

    def _splice(self, offset: int, end: int | None) -> int | None:
        if self._pipe is None or end is None:
            return None
        out_of, into = self._pipe
        count = self._body.splice(into, min(_SPLICE_BYTES, end - offset))
        if count:
            self._writer.splice(out_of, count, offset)
            self._work.accept_range(offset, offset + count)
        return count

    def __enter__(self) -> Passage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing.close()
