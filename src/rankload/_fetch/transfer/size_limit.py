"""The caller's ``max_bytes``. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rankload.errors import FetchError


@dataclass(frozen=True)
class SizeLimit:
    """A limit on the size of one file.

    Attributes:
        max_bytes: the most that the whole call may download, in bytes; None for no limit.
        downloaded_bytes: bytes that other files of the same call have downloaded.
    """

    max_bytes: int | None = None
    downloaded_bytes: int = 0

    def check(self, display_name: str, size_bytes: int, *, is_announced: bool) -> None:
        """Refuse a file that is too large.

        Args:
            display_name: the URL without secrets, for messages.
            size_bytes: announced size of the whole file or, without one, the number of bytes that have come.
            is_announced: whether ``size_bytes`` is the announced size.

        Raises:
            FetchError: the file is larger than the limit. A retry or a mirror is pointless: the file is as large there.
        """
        if self.max_bytes is None or self.downloaded_bytes + size_bytes <= self.max_bytes:
            return
        what = f"the file has {size_bytes} bytes" if is_announced else f"{size_bytes} bytes have come, with no end"
        before = f" after {self.downloaded_bytes} bytes of other files" if self.downloaded_bytes else ""
        raise FetchError(
            f"{display_name}: {what}{before}, more than max_bytes={self.max_bytes} allows; raise the limit "
            "(max_bytes=, --max-bytes, RANKLOAD_MAX_BYTES) if this is the file you want",
            url=display_name,
            size_bytes=size_bytes if is_announced else None,
            max_bytes=self.max_bytes,
            is_permanent=True,
        )


def exceeds_limit(error: FetchError) -> bool:
    """Return whether an error is one of `SizeLimit`."""
    return "max_bytes" in error.fields
