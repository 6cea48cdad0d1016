"""Partial files: one per download, published by an atomic rename, or left to be resumed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from rankload._cache.access import NEW_FILE_MODE, share_file
from rankload._cache.files import no_space_error, wrap_write_errors
from rankload._cache.layout import Entry
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.journal import Journal, PartialContent, journal_path
from rankload._fetch.partials.open_file import OpenFile
from rankload._fetch.partials.owner import abandoned_path, own_path
from rankload._fetch.partials.room import Room
from rankload._fetch.partials.writer import PartialWriter
from rankload._platform.byte_ranges import ByteRanges
from rankload._platform.linux import allocate, rename_if_absent
from rankload._settings import Settings
from rankload.errors import CacheError, RankloadError, VerificationError

#: Bytes to allocate beyond the file until it is complete: without room for a record, the file cannot be published.
_SPARE_BYTES = 64 << 10


class SupersededError(Exception):
    """Another process took this one for dead, or published a file under the name: look into the cache again."""


class Partial:
    """An open, exclusively created partial file in the directory of the final file. The `Target` of a transfer.

    Use as a context manager. Without publish(), its exit abandons the file if a later download can resume it, and else
    removes it.

    Args:
        entry: cache entry whose file is downloaded.
        settings: sizes and intervals.
        sha256: expected digest of the whole file, or its first digits, for the journal.
        may_be_left: whether the file may be left for a later download; False removes it in any case.

    Attributes:
        path: path of the partial file.
        url_key: key of the URL that bytes come from, for the journal.
        content: whole content to which the adopted bytes belong; None if no bytes were adopted.
        spans: ranges of the bytes that are written.
    """

    def __init__(
        self, entry: Entry, settings: Settings, sha256: str | None = None, *, may_be_left: bool = True
    ) -> None:
        self.path, self.url_key = own_path(entry), ""
        self.content: PartialContent | None = None
        self.spans = ByteRanges()
        self._entry, self._settings, self._sha256 = entry, settings, sha256
        self._journal: Journal | None = None
        self._keeper: _Keeper | None = None
        self._writers: list[PartialWriter] = []
        self._size_bytes: int | None = None
        self._room = Room(0)
        self._lock = threading.Lock()
        self._may_be_left, self._is_mixed, self._is_gone = may_be_left, False, False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self.wrap_write_errors():
            try:
                self._file = OpenFile(os.open(self.path, flags, NEW_FILE_MODE))
                share_file(self.descriptor, self.path.parent)
            except FileExistsError:  # somebody else's: it stays
                raise
            except BaseException:  # such as SIGTERM's: there is no exit to remove the file yet
                with suppress(OSError):
                    self.path.unlink()
                raise

    @property
    def descriptor(self) -> int:
        """File descriptor, open for reading and writing; -1 after it is closed."""
        return self._file.descriptor

    def wrap_write_errors(self) -> AbstractContextManager[None]:
        """Translate the errors of a write to this file."""
        return wrap_write_errors(self.path, self._size_bytes)

    def adopt(self, descriptor: int, content: PartialContent, spans: ByteRanges) -> None:
        """Continue with existing bytes: of this file, or of another file that has been renamed to its path."""
        if descriptor != self.descriptor:
            self._file.close()
            self._file = OpenFile(descriptor)
        self.content, self.spans = content, spans

    def clear(self) -> None:
        """Forget all bytes."""
        self.take_writers_back()
        self._remove_journal()
        self._is_mixed = False
        self.content, self.spans, self._room = None, ByteRanges(), Room(0)
        with self.wrap_write_errors():
            os.ftruncate(self.descriptor, 0)

    def mix(self) -> None:
        """Accept another origin's bytes, too, and drop the journal: no later download could tell the bytes apart."""
        self._remove_journal()
        self._is_mixed = True

    # A transfer's target

    def make_room(self, version: Version, *, is_resumable: bool) -> None:
        """Check and allocate disk space before the first byte, and begin the journal (see `Target.make_room`)."""
        self._size_bytes = version.size_bytes
        if version.size_bytes is not None:
            self._room = Room(version.size_bytes + _SPARE_BYTES)
            self._check_space(version.size_bytes)
            self._allocate()
            if is_resumable and self._may_be_left and not self._is_mixed and self._journal is None:
                content = PartialContent(
                    self.url_key, version.size_bytes, version.etag, version.last_modified, self._sha256
                )
                self._journal = Journal(self.path, content, self.spans)
                self._keeper = _Keeper(self._file, self._journal, self._settings.lease_heartbeat_seconds)

    def writer(self) -> PartialWriter:
        """Return a writer for one thread (see `Target.writer`)."""
        writer = PartialWriter(self._file, self.wrap_write_errors, self._note)
        self._writers = [*(one for one in self._writers if not one.is_closed), writer]
        return writer

    def lent(self) -> AbstractContextManager[int]:
        """Lend a descriptor to a thread that reads what others have written."""
        return self._file.lent()

    def take_writers_back(self, *, may_wait: bool = True) -> None:
        """Close all writers, so that threads that were left behind write no more. Waits for a running write."""
        for writer in self._writers:
            with suppress(CacheError):
                writer.close(may_wait=may_wait)

    def _note(self, begin: int, end: int) -> None:
        with self._lock:
            self.spans.add(begin, end)
        self._allocate()
        if (journal := self._journal) is not None:
            journal.add(begin, end)

    def _allocate(self) -> None:
        """Allocate disk space ahead of the arriving bytes. Costs a system call only after their number has doubled."""
        with self._lock:
            begin, end = self._room.grown(self.spans.total_bytes)
        if begin < end:
            with self.wrap_write_errors():
                allocate(self.descriptor, begin, end)

    # Its end

    def finish(self, size_bytes: int) -> os.stat_result:
        """Force the bytes to disk and close the file; return its status. NFS reports a full disk or quota only here."""
        self._end_journal()
        self.take_writers_back(may_wait=False)  # one may be that of a stream that still tries to connect
        with self.wrap_write_errors():
            self._file.settle(self._settings.progress_seconds)  # a write's error says more than a wrong length
            found = os.fstat(self.descriptor).st_size
            if found < size_bytes:
                raise OSError(errno.EIO, f"the file has only {found} of the {size_bytes} bytes that were written")
            # drop the spare room, and any rest of a longer file that was adopted or announced
            os.ftruncate(self.descriptor, size_bytes)
            self._file.sync_and_close(self._settings.progress_seconds)
            self._remove_journal()  # free an inode: the record needs one, and the disk may have none left
            return self.path.stat()  # by name, after the close: only then has an NFS server set the final mtime

    def publish(self, *, may_replace: bool = True) -> None:
        """Give the finished file its final name.

        Args:
            may_replace: whether a file of that name may be replaced. False if there was none before: then a file that
                appeared since is another's.

        Raises:
            SupersededError: a file of that name appeared.
        """
        if may_replace:
            self.move_to(self._entry.path)
        else:
            try:
                with wrap_write_errors(self._entry.path):
                    rename_if_absent(self.path, self._entry.path)
            except CacheError as error:
                if error.errno == errno.EEXIST:
                    raise SupersededError(str(self._entry.path)) from None
                raise
            self._is_gone = True
        _sync_directory(self._entry.path.parent)

    def move_to(self, path: Path) -> None:
        """Rename the file; it is no partial file any more."""
        with wrap_write_errors(path):
            self.path.replace(path)
        self._is_gone = True

    @contextmanager
    def noticing_its_loss(self) -> Iterator[None]:
        """Translate an error about a partial file that has disappeared to SupersededError."""
        try:
            yield
        except CacheError as error:
            is_lost = not self._is_gone and not self.path.exists() and self.path.parent.is_dir()
            if error.errno in (errno.ENOENT, errno.ESTALE) and is_lost:
                raise SupersededError(str(self.path)) from None
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end_journal()
        self.take_writers_back()  # an abandoned file belongs to the next download
        self._file.close()
        if not self._is_gone and self._is_worth_keeping(error):
            self._abandon()
        with suppress(OSError):
            journal_path(self.path).unlink(missing_ok=True)
            if not self._is_gone:
                self.path.unlink()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Return whether to leave the file for a later download.

        A wrong file is not worth keeping, nor one that could not be written (the disk may be full), nor one with few
        bytes.
        """
        is_ours = isinstance(error, RankloadError) and error.rank is None  # else another rank's error
        is_bad = is_ours and isinstance(error, (VerificationError, CacheError))
        has_enough = self.spans.total_bytes >= self._settings.chunk_bytes
        return not is_bad and has_enough and journal_path(self.path).exists()

    def _abandon(self) -> None:
        path = abandoned_path(self._entry)
        with suppress(OSError):
            self.path.rename(path)
            self._is_gone = True
            journal_path(self.path).rename(journal_path(path))

    def _end_journal(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _remove_journal(self) -> None:
        self._end_journal()
        journal_path(self.path).unlink(missing_ok=True)

    def _check_space(self, size_bytes: int) -> None:
        try:
            disk = shutil.disk_usage(self.path.parent)
            needed_bytes = size_bytes + _SPARE_BYTES - os.fstat(self.descriptor).st_blocks * 512
        except OSError:  # the directory is gone, or the filesystem does not report free space
            return
        # some FUSE filesystems do not report it either: 0 of 0 bytes are free
        if disk.free < needed_bytes and disk.total:
            raise no_space_error(self.path, size_bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


class _Keeper:
    """Thread that repeatedly syncs the file and records in the journal what is on disk, and that this process lives."""

    def __init__(self, file: OpenFile, journal: Journal, interval_seconds: float) -> None:
        self._file, self._journal, self._interval_seconds = file, journal, interval_seconds
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankload-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end, without waiting: a sync may take long."""
        self._stop_requested.set()

    def _run(self) -> None:
        # OpenFile keeps a failure, and raises it when the file is finished
        with suppress(OSError), self._file.lent() as descriptor:
            while not self._stop_requested.wait(self._interval_seconds):
                count = self._journal.count
                os.fdatasync(descriptor)
                self._journal.synced(count)


def _sync_directory(directory: Path) -> None:
    # some network filesystems cannot sync a directory; the rename is atomic anyway
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
