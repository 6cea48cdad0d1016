"""Every error that rankload raises.

::

    RankloadError
    ├── ArgumentError (ValueError)            an argument is wrong before anything was done
    ├── ArgumentMismatchError (ValueError)    ranks passed different arguments to one call
    ├── FetchError (URLError, an OSError)     the bytes could not be had
    │   ├── HTTPStatusError (HTTPError)       the origin answered 4xx or 5xx; has ``code``
    │   ├── NetworkError (ConnectionError)    no connection, or it broke
    │   ├── FetchTimeoutError (TimeoutError)  no connection or no byte in time
    │   ├── TruncatedError                    fewer (or more) bytes than the origin promised
    │   ├── ContentChangedError               the origin's file kept changing while it was fetched
    │   └── OfflineError                      not cached, and offline was asked for
    ├── VerificationError (RuntimeError)      the bytes are not what they should be
    │   ├── DigestMismatchError               SHA-256 or hash prefix differs
    │   └── NotACheckpointError               HTML, a truncated archive, some other file
    ├── CacheError (OSError)                  the cache directory or a file in it cannot be used
    │   └── MissingFileError (FileNotFoundError)  there is none
    ├── LoadError (RuntimeError)              a verified file could not be turned into tensors
    │   └── UnsafePickleError (UnpicklingError)   weights_only refused what the file wants to import
    ├── DeviceError (RuntimeError)            no device of this process fits
    └── CoordinationError (RuntimeError)      the ranks could not act together
        ├── ArrivalTimeoutError (TimeoutError)    some rank never made the call
        ├── ProgressTimeoutError (TimeoutError)   a rank lives but does not move
        ├── RankLostError (ConnectionError)       a rank was killed or is frozen
        ├── StoreLostError (ConnectionError)      the store's host is gone
        ├── CallCancelledError                    a rank got a signal and left the call
        └── RankFailedError                       a rank raised something that is not ours

Each is also the builtin that people already catch. All of them cross process boundaries: by pickle between
processes of one host, and as JSON through the store, so that every rank raises the same error.
"""

from __future__ import annotations

import errno
import pickle
from typing import Any
from urllib.error import HTTPError, URLError

from rankload._text import cut, on_one_line, printable, printable_lines

#: Longest text in an error of this process: names in files may have gigabytes.
_MAX_CHARACTERS_HERE = 1 << 16


class RankloadError(Exception):
    """Base of all errors.

    Attributes:
        message: what happened, where, and what to do.
        fields: the facts in the message, by name. Each is an attribute, too, of the class that declares it; one that
            the message does not mention is None.
        rank: the rank where it happened, None while a single process is concerned.
        host: that rank's host name.
        is_from_another_rank: whether this process only heard of it. Does not survive pickling.

    Texts in an error come from files, servers and other ranks as well. Whatever a terminal or a log would not show as
    it is gets escaped here, whoever raises the error; only line breaks stay, for messages of several lines. Code that
    puts a foreign text into a message escapes its line breaks, too: `printable` or ``!r``.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        message = printable_lines(cut(message, _MAX_CHARACTERS_HERE))
        Exception.__init__(self, message)  # URLError's and OSError's own take other arguments
        self.message = message
        self.fields = {name: _printable_field(value) for name, value in fields.items()}
        for name, value in self.fields.items():
            # another version's may be called as something that an exception has
            if name in _declared(type(self)) or not hasattr(type(self), name):
                setattr(self, name, value)
        self.rank: int | None = None
        self.host: str | None = None
        self.is_from_another_rank = False

    def __str__(self) -> str:
        """The message, and the rank and host it comes from when there are several.

        Another rank's error takes one line, however long it is: that rank prints the rest, and ``message`` has it here.
        """
        if self.rank is None:
            return self.message
        where = f"rank {self.rank} on {printable(str(self.host))}"
        if not self.is_from_another_rank:
            return f"{self.message} [{where}]"
        return f"{on_one_line(self.message)} [{where}; its traceback is there]"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by content: keyword fields do not survive Exception's own way."""
        return from_wire, (to_wire(self),)


class ArgumentError(RankloadError, ValueError):
    """An argument is wrong; nothing was done.

    Attributes:
        url: the URL, without secrets.
        variable: the environment variable.
        value: what it holds.
        launcher: the launcher that set it.
    """

    url: str | None = None
    variable: str | None = None
    value: str | None = None
    launcher: str | None = None


class ArgumentMismatchError(RankloadError, ValueError):
    """Ranks passed different arguments to the same collective call.

    Attributes:
        first_rank: the rank whose arguments came first.
        other_rank: the rank whose arguments differ.
    """

    first_rank: int | None = None
    other_rank: int | None = None


class FetchError(RankloadError, URLError):
    """The bytes could not be had from the origin.

    Attributes:
        url: the URL, without secrets.
        size_bytes: what the origin announces.
        max_bytes: the caller's limit.
        is_permanent: another try would not help.
    """

    is_permanent: bool | None = None
    url: str | None = None
    size_bytes: int | None = None
    max_bytes: int | None = None

    @property
    def reason(self) -> str:  # type: ignore[override]  # URLError sets it; here it is the message
        """URLError's attribute, for code that reads it."""
        return self.message


class HTTPStatusError(FetchError, HTTPError):
    """The origin answered with an error status.

    Attributes:
        code: the status.
        retry_after_seconds: how long the origin asks to wait.
    """

    url: Any = None
    code: int = 0
    retry_after_seconds: float | None = None

    hdrs: Any = None  # an answer's headers and body may be secret, and do not travel between ranks
    fp: Any = None

    @property
    def msg(self) -> str:  # type: ignore[override]
        """HTTPError's attribute, for code that reads it."""
        return self.message

    def __getattr__(self, name: str) -> Any:
        """HTTPError's own asks a file, which is not there."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def read(self, *_: Any) -> bytes:
        """As HTTPError's; nothing of the body is kept but what the message shows."""
        return b""

    def close(self) -> None:
        """As HTTPError's; nothing is open."""


class NetworkError(FetchError, ConnectionError):
    """Name resolution, connection or TLS failed, or the connection broke."""


class FetchTimeoutError(FetchError, TimeoutError):
    """No connection, or no byte, within the deadline.

    Attributes:
        is_too_slow: bytes came, but fewer than ``minimum_bytes_per_second``.
    """

    is_too_slow: bool | None = None


class TruncatedError(FetchError):
    """The body's length is not what the origin promised.

    Attributes:
        expected: bytes promised.
        got: bytes that came.
    """

    expected: int | None = None
    got: int | None = None


class ContentChangedError(FetchError):
    """The file at the origin has changed while it was fetched.

    Attributes:
        path: the file in the cache.
    """

    path: str | None = None


class OfflineError(FetchError):
    """The file is not in the cache and offline mode was asked for.

    Attributes:
        path: where it would be.
    """

    path: str | None = None


class VerificationError(RankloadError, RuntimeError):
    """The bytes came, but they are not what they should be.

    Attributes:
        path: the file.
        url: where it came from, without secrets.
    """

    path: str | None = None
    url: str | None = None


class DigestMismatchError(VerificationError):
    """The SHA-256 (or its prefix) is not the expected one.

    Attributes:
        expected: hex digits.
        got: hex digits.
        source: who vouched for what was expected.
    """

    expected: str | None = None
    got: str | None = None
    source: str | None = None


class NotACheckpointError(VerificationError):
    """The file is no checkpoint: a web page, a truncated archive, something else.

    Attributes:
        got: what it is.
        origin: where it came from, without secrets.
        size_bytes: its size.
    """

    got: str | None = None
    origin: str | None = None
    size_bytes: int | None = None


class CacheError(RankloadError, OSError):
    """The cache directory, or a file in it, cannot be used; ``errno`` says why.

    Attributes:
        path: the file or directory.
        needed_bytes: room that is needed.
        free_bytes: room that there is.
    """

    path: str | None = None
    needed_bytes: int | None = None
    free_bytes: int | None = None

    def __new__(cls, message: str, **fields: Any) -> CacheError:
        """Make a MissingFileError where that is what ``errno`` says, as OSError does."""
        is_missing = cls is CacheError and fields.get("errno") == errno.ENOENT
        return super().__new__(MissingFileError if is_missing else cls, message)

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.errno = fields.get("errno")  # OSError's own attribute hides the field


class MissingFileError(CacheError, FileNotFoundError):
    """There is no such file, or no such directory."""


class LoadError(RankloadError, RuntimeError):
    """A verified file could not be turned into tensors.

    Attributes:
        path: the file.
        tensor: the tensor's name.
        dtype: its dtype.
        size_bytes: its size, or the file's.
        missing_count: names that the module has and the file lacks.
        unexpected_count: names that the file has and the module lacks.
        unfit_count: tensors of another shape or dtype.
        source_rank: the rank that broadcasts.
        errno: why the system refused.
    """

    path: str | None = None
    tensor: str | None = None
    dtype: str | None = None
    size_bytes: int | None = None
    missing_count: int | None = None
    unexpected_count: int | None = None
    unfit_count: int | None = None
    source_rank: int | None = None
    errno: int | None = None


class UnsafePickleError(LoadError, pickle.UnpicklingError):
    """``weights_only=True`` refused what the file wants to import.

    Attributes:
        refused: the names.
    """

    refused: str | None = None


class DeviceError(RankloadError, RuntimeError):
    """No device of this process fits.

    Attributes:
        device: the device.
        device_type: its type.
        count: devices of that type that this process has.
        local_rank: of this rank.
        map_location: what was asked for.
    """

    device: str | None = None
    device_type: str | None = None
    count: int | None = None
    local_rank: int | None = None
    map_location: str | None = None


class CoordinationError(RankloadError, RuntimeError):
    """The ranks could not act together.

    Attributes:
        place: where the store is.
        port: the port that something else holds.
        unreachable_rank: a rank that others cannot connect to.
        upstream_rank: the rank before it in the relay.
        upstream_host: its host.
    """

    place: str | None = None
    port: int | None = None
    unreachable_rank: int | None = None
    upstream_rank: int | None = None
    upstream_host: str | None = None


class ArrivalTimeoutError(CoordinationError, TimeoutError):
    """Some rank did not make the call in time.

    Attributes:
        missing: the ranks, such as ``1-3, 7``.
    """

    missing: str | None = None


class ProgressTimeoutError(CoordinationError, TimeoutError):
    """A rank is alive but makes no progress.

    Attributes:
        stuck_rank: the rank.
        stuck_host: its host.
        phase: what it was doing.
        path: the file that does not answer.
    """

    stuck_rank: int | None = None
    stuck_host: str | None = None
    phase: str | None = None
    path: str | None = None


class RankLostError(CoordinationError, ConnectionError):
    """A rank was killed or is frozen.

    Attributes:
        lost_rank: the rank.
        lost_host: its host.
        phase: what it was doing.
    """

    lost_rank: int | None = None
    lost_host: str | None = None
    phase: str | None = None


class StoreLostError(CoordinationError, ConnectionError):
    """The store through which the ranks talk is gone.

    Attributes:
        cause: what its client said.
    """

    cause: str | None = None


class CallCancelledError(CoordinationError):
    """A rank received a signal and left the call."""


class RankFailedError(CoordinationError):
    """A rank raised an error that is not rankload's own.

    Attributes:
        cause_type: the class of that error.
    """

    cause_type: str | None = None


def to_wire(error: RankloadError) -> dict[str, Any]:
    """Return the error as JSON-able data, its texts cut to MAX_MESSAGE_CHARACTERS."""
    return {
        "type": type(error).__name__,
        "message": cut(error.message),
        "fields": {name: _plain(value) for name, value in error.fields.items()},
        "rank": error.rank,
        "host": error.host,
    }


def from_wire(wire: dict[str, Any]) -> RankloadError:
    """Rebuild what to_wire() gave; an unknown type (another version's) becomes a RankFailedError."""
    error_type = _subclasses(RankloadError).get(wire["type"], RankFailedError)
    error = error_type(wire["message"], **wire["fields"])
    error.rank, error.host = wire["rank"], wire["host"]
    return error


def _declared(error_type: type[RankloadError]) -> frozenset[str]:
    """Return the names of the attributes that a class and its bases declare."""
    return frozenset(name for kind in error_type.__mro__ for name in getattr(kind, "__annotations__", {}))


def _printable_field(value: Any) -> Any:
    if isinstance(value, str):
        return printable_lines(cut(value, _MAX_CHARACTERS_HERE))
    if type(value) in (list, tuple):
        return type(value)(map(_printable_field, value))
    return value


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return cut(str(value))


def _subclasses(base: type[RankloadError]) -> dict[str, type[RankloadError]]:
    found = {base.__name__: base}
    for subclass in base.__subclasses__():
        found.update(_subclasses(subclass))
    return found


#: Those that ``rankload`` itself has, too: tracebacks show the shortest name.
for _error_type in (
    RankloadError,
    ArgumentError,
    FetchError,
    VerificationError,
    CacheError,
    LoadError,
    CoordinationError,
):
    _error_type.__module__ = "rankload"
