"""Opening local files; of torch.hub's legacy zip, an archive of one checkpoint, what is in it."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rankload._checkpoint.broken import BrokenFileError
from rankload._checkpoint.open import sniff
from rankload._checkpoint.source import LocalSource

#: What deflate can come to (RFC 1951): 258 bytes in 2 bits. No weights are packed better by any other method.
LARGEST_RATIO = 1032


def open_unpacked(path: Path, closing: ExitStack) -> LocalSource:
    """Open a file, or the only member of an archive of one.

    Args:
        path: the file.
        closing: closes it, and removes what was unpacked.

    Raises:
        BrokenFileError: the archive is damaged.
    """
    if sniff(path) == "single_member_zip":
        return LocalSource(closing.enter_context(unpacked(path)))
    return LocalSource(closing.enter_context(path.open("rb", buffering=0)).fileno())


@contextmanager
def unpacked(path: Path) -> Iterator[int]:
    """Unpack an archive of one member into a file without a name: the archive has no say in where its member goes.

    Raises:
        BrokenFileError: it is damaged.
    """
    with tempfile.TemporaryFile() as content:
        try:
            with zipfile.ZipFile(path) as archive:
                (member,) = archive.infolist()
                if member.file_size > LARGEST_RATIO * member.compress_size:
                    raise BrokenFileError(f"archive of one file that would have {member.file_size} bytes unpacked")
                with archive.open(member) as packed:
                    shutil.copyfileobj(packed, content, length=1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise BrokenFileError(f"archive of one file that cannot be unpacked ({error})") from error
        content.flush()
        yield content.fileno()
