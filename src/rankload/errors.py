"""Every error that rankload raises.

::

    RankloadError
    ├── ArgumentError (ValueError)            an argument is invalid; nothing was done
    ├── ArgumentMismatchError (ValueError)    ranks passed different arguments to one call
    ├── FetchError (URLError, an OSError)     the file could not be fetched from its origin
    │   ├── HTTPStatusError (HTTPError)       the origin answered 4xx or 5xx; has ``code``
    │   ├── NetworkError (ConnectionError)    the connection failed or broke
    │   ├── FetchTimeoutError (TimeoutError)  no connection or no byte in time
    │   ├── TruncatedError                    fewer (or more) bytes than the origin promised
    │   ├── ContentChangedError               the origin's file kept changing while it was fetched
    │   └── OfflineError                      the file is not cached, and offline mode is on
    ├── VerificationError (RuntimeError)      the file was fetched, but is not the expected one
    │   ├── DigestMismatchError               SHA-256 or hash prefix differs
    │   └── NotACheckpointError               HTML, a truncated archive, some other file
    ├── CacheError (OSError)                  the cache directory or a file in it cannot be used
    │   └── MissingFileError (FileNotFoundError)  no such file or directory
    ├── LoadError (RuntimeError)              a verified file could not be turned into tensors
    │   └── UnsafePickleError (UnpicklingError)   weights_only refused a name that the file imports
    ├── DeviceError (RuntimeError)            this process has no suitable device
    └── CoordinationError (RuntimeError)      the ranks could not act together
        ├── ArrivalTimeoutError (TimeoutError)    some rank never made the call
        ├── ProgressTimeoutError (TimeoutError)   a rank is alive but makes no progress
        ├── RankLostError (ConnectionError)       a rank was killed or is frozen
        ├── StoreLostError (ConnectionError)      the store's host is gone
        ├── CallCancelledError                    a rank got a signal and left the call
        └── RankFailedError                       a rank raised an error that is not rankload's own

Most classes also subclass the builtin (in parentheses) that callers already catch. All errors cross process
boundaries: by pickle between processes of one host, and as JSON through the store, so every rank raises the same error.
"""

from __future__ import annotations

import errno
import pickle
from typing import Any
from urllib.error import HTTPError, URLError

from rankload._text import cut, on_one_line, printable, printable_lines

#: Longest text in an error of this process: a name in a file may be gigabytes long.
_MAX_CHARACTERS_HERE = 1 << 16


class RankloadError(Exception):
    """Base of all errors.

    Attributes:
        message: what happened, where, and what to do.
        fields: facts in the message, by name. Each is also an attribute of the class that declares it. A field that
            the message does not mention is None.
        rank: the rank where the error happened; None in a call of a single process.
        host: host name of that rank.
        is_from_another_rank: whether the error happened on another rank. Does not survive pickling.

    The texts in an error may come from files, servers and other ranks. This class escapes every character that a
    terminal or a log would not show as is. Only line breaks stay, for messages of several lines. Code that puts a
    foreign text into a message also escapes the text's line breaks, by `printable` or ``!r``.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        message = printable_lines(cut(message, _MAX_CHARACTERS_HERE))
        Exception.__init__(self, message)  # __init__ of URLError and OSError takes other arguments
        self.message = message
        self.fields = {name: _printable_field(value) for name, value in fields.items()}
        for name, value in self.fields.items():
            # a field of another rankload version may have the name of an exception's own attribute
            if name in _declared(type(self)) or not hasattr(type(self), name):
                setattr(self, name, value)
        self.rank: int | None = None
        self.host: str | None = None
        self.is_from_another_rank = False

    def __str__(self) -> str:
        """Return the message; in a call of several ranks also the rank and host where the error happened.

        Another rank's error is cut to one line: that rank prints the whole, and ``message`` holds it here.
        """
        if self.rank is None:
            return self.message
        where = f"rank {self.rank} on {printable(str(self.host))}"
        if not self.is_from_another_rank:
            return f"{self.message} [{where}]"
        return f"{on_one_line(self.message)} [{where}; its traceback is there]"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by content: Exception's own pickling loses the keyword fields."""
        return from_wire, (to_wire(self),)


class ArgumentError(RankloadError, ValueError):
    """An argument is invalid; nothing was done.

    Attributes:
        url: the URL, without secrets.
        variable: name of the invalid environment variable.
        value: value of that variable.
        launcher: the launcher that set the variable.
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
    """The file could not be fetched from its origin.

    Attributes:
        url: the URL, without secrets.
        size_bytes: size that the origin announces, in bytes.
        max_bytes: the caller's limit on that size, in bytes.
        is_permanent: whether another attempt would fail, too.
    """

    is_permanent: bool | None = None
    url: str | None = None
    size_bytes: int | None = None
    max_bytes: int | None = None

    @property
    def reason(self) -> str:  # type: ignore[override]  # URLError sets it; here it is the message
        """The message, for code that reads URLError's ``reason``."""
        return self.message


class HTTPStatusError(FetchError, HTTPError):
    """The origin answered with an error status.

    Attributes:
        code: the HTTP status code.
        retry_after_seconds: how long the origin asks to wait, in seconds.
    """

    url: Any = None
    code: int = 0
    retry_after_seconds: float | None = None

    hdrs: Any = None  # a response's headers and body may be secret, and do not travel between ranks
    fp: Any = None

    @property
    def msg(self) -> str:  # type: ignore[override]
        """The message, for code that reads HTTPError's ``msg``."""
        return self.message

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError. HTTPError would look the attribute up in the response's file, which is not kept."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def read(self, *_: Any) -> bytes:
        """Return no bytes: only the part of the body that the message shows is kept."""
        return b""

    def close(self) -> None:
        """Do nothing: no file is open."""


class NetworkError(FetchError, ConnectionError):
    """Name resolution, connection or TLS failed, or the connection broke."""


class FetchTimeoutError(FetchError, TimeoutError):
    """No connection, or no byte, within the deadline.

    Attributes:
        is_too_slow: whether bytes came, but fewer than ``minimum_bytes_per_second``.
    """

    is_too_slow: bool | None = None


class TruncatedError(FetchError):
    """The body's length is not what the origin promised.

    Attributes:
        expected: number of bytes that the origin promised.
        got: number of bytes that came.
    """

    expected: int | None = None
    got: int | None = None


class ContentChangedError(FetchError):
    """The file at the origin changed while it was fetched.

    Attributes:
        path: path of the file in the cache.
    """

    path: str | None = None


class OfflineError(FetchError):
    """The file is not in the cache, and offline mode is on.

    Attributes:
        path: path that the file would have in the cache.
    """

    path: str | None = None


class VerificationError(RankloadError, RuntimeError):
    """The file was fetched, but is not the expected one.

    Attributes:
        path: path of the file.
        url: URL of the file, without secrets.
    """

    path: str | None = None
    url: str | None = None


class DigestMismatchError(VerificationError):
    """The SHA-256 (or its prefix) is not the expected one.

    Attributes:
        expected: the expected SHA-256, or its prefix, in hex digits.
        got: the SHA-256 of the file, in hex digits.
        source: where the expected digest comes from.
    """

    expected: str | None = None
    got: str | None = None
    source: str | None = None


class NotACheckpointError(VerificationError):
    """The file is not a checkpoint: a web page, a truncated archive, something else.

    Attributes:
        got: what the file looks like.
        origin: origin of the file, without secrets.
        size_bytes: size of the file in bytes.
    """

    got: str | None = None
    origin: str | None = None
    size_bytes: int | None = None


class CacheError(RankloadError, OSError):
    """The cache directory, or a file in it, cannot be used; ``errno`` says why.

    Attributes:
        path: path of the file or directory.
        needed_bytes: disk space that the file needs, in bytes.
        free_bytes: free disk space, in bytes.
    """

    path: str | None = None
    needed_bytes: int | None = None
    free_bytes: int | None = None

    def __new__(cls, message: str, **fields: Any) -> CacheError:
        """Create a MissingFileError if ``errno`` is ENOENT, as OSError creates a FileNotFoundError."""
        is_missing = cls is CacheError and fields.get("errno") == errno.ENOENT
        return super().__new__(MissingFileError if is_missing else cls, message)

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.errno = fields.get("errno")  # OSError's own attribute would hide the field


class MissingFileError(CacheError, FileNotFoundError):
    """No such file or directory."""


class LoadError(RankloadError, RuntimeError):
    """A verified file could not be turned into tensors.

    Attributes:
        path: path of the file.
        tensor: name of the tensor.
        dtype: dtype of the tensor.
        size_bytes: size of the tensor, or of the file, in bytes.
        missing_count: number of names that the module has and the file lacks.
        unexpected_count: number of names that the file has and the module lacks.
        unfit_count: number of tensors whose shape or dtype does not fit.
        source_rank: the rank that broadcasts.
        errno: errno of the failed system call.
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
    """``weights_only=True`` refused a name that the file's pickle imports.

    Attributes:
        refused: the refused names.
    """

    refused: str | None = None


class DeviceError(RankloadError, RuntimeError):
    """This process has no suitable device.

    Attributes:
        device: the device that is missing.
        device_type: type of that device, such as ``cuda``.
        count: number of devices of that type in this process.
        local_rank: index of this rank among the ranks of its node.
        map_location: the ``map_location=`` that the caller passed.
    """

    device: str | None = None
    device_type: str | None = None
    count: int | None = None
    local_rank: int | None = None
    map_location: str | None = None


class CoordinationError(RankloadError, RuntimeError):
    """The ranks could not act together.

    Attributes:
        place: address of the store, or a name for it.
        port: the relay's port on this host, to which something else keeps connecting.
        unreachable_rank: a rank that others cannot connect to.
        upstream_rank: the previous rank in the relay.
        upstream_host: host name of the previous rank.
    """

    place: str | None = None
    port: int | None = None
    unreachable_rank: int | None = None
    upstream_rank: int | None = None
    upstream_host: str | None = None


class ArrivalTimeoutError(CoordinationError, TimeoutError):
    """Some rank did not make the call in time.

    Attributes:
        missing: the ranks that did not make the call, such as ``1-3, 7``.
    """

    missing: str | None = None


class ProgressTimeoutError(CoordinationError, TimeoutError):
    """A rank is alive but makes no progress.

    Attributes:
        stuck_rank: the rank that makes no progress.
        stuck_host: host name of that rank.
        phase: what that rank was doing, such as ``downloading``.
        path: path of the file whose reads do not return.
    """

    stuck_rank: int | None = None
    stuck_host: str | None = None
    phase: str | None = None
    path: str | None = None


class RankLostError(CoordinationError, ConnectionError):
    """A rank was killed or is frozen.

    Attributes:
        lost_rank: the rank that was lost.
        lost_host: host name of that rank.
        phase: what that rank was doing last, such as ``downloading``.
    """

    lost_rank: int | None = None
    lost_host: str | None = None
    phase: str | None = None


class StoreLostError(CoordinationError, ConnectionError):
    """The store through which the ranks talk does not answer.

    Attributes:
        cause: error text of the store's client.
    """

    cause: str | None = None


class CallCancelledError(CoordinationError):
    """A rank received a signal and left the call."""


class RankFailedError(CoordinationError):
    """A rank raised an error that is not rankload's own.

    Attributes:
        cause_type: class name of that error.
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
    """Rebuild an error from `to_wire`'s data. A type that only another version has becomes a RankFailedError."""
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


# tracebacks show a class by its __module__: these classes are also in ``rankload``, which is the shortest name
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
del _error_type
