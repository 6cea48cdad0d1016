"""What an origin keeps: the resources that it serves, and the requests that it saw."""

from __future__ import annotations

from dataclasses import dataclass

from harness.replies import Reply


@dataclass
class Request:
    """One request as the origin saw it. Filled in while it runs.

    Attributes:
        headers: By lower-case name.
        body_bytes_sent: Body bytes handed to the kernel, framing not counted; at most a socket buffer
            of them may not have reached a client that went away.
        is_complete: The whole body that this reply was meant to have has been sent.
        concurrency: Requests for the path that ran when this one came, itself included. One whose client went
            away runs until the server has noticed.
        ended_at: ``time.monotonic()``; ``None`` while it runs.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    started_at: float
    concurrency: int = 1
    status: int | None = None
    body_bytes_sent: int = 0
    is_complete: bool = False
    is_held: bool = False
    ended_at: float | None = None

    @property
    def is_running(self) -> bool:
        """False from the last byte on: a client that has it may count on its place for the next request."""
        return self.ended_at is None and not self.is_complete


@dataclass
class Resource:
    """What stands under one path.

    Attributes:
        served: Requests answered.
        sent_before: Body bytes that an earlier resource of this path had sent.
    """

    content: memoryview
    replies: tuple[Reply, ...]
    etag: str
    sent_before: int
    served: int = 0

    def next_reply(self, running: int, bytes_sent: int) -> Reply:
        """The answer to a request for this path, beside ``running`` others and after ``bytes_sent``."""
        reply = self.replies[min(self.served, len(self.replies) - 1)]
        self.served += 1
        if reply.expires_after_bytes is not None and bytes_sent - self.sent_before >= reply.expires_after_bytes:
            return Reply(status=403, headers=reply.headers)
        if reply.max_concurrent is not None and running >= reply.max_concurrent:
            return Reply(status=429, headers=reply.headers)
        return reply
