"""The error tree: each error is the builtin that people catch already, and crosses process boundaries."""

import ast
import copy
import importlib
import json
import pickle
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankload
from rankload import errors
from rankload._text import MAX_MESSAGE_CHARACTERS, cut, printable
from rankload.errors import RankloadError, from_wire, to_wire

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RankloadError)]

BUILTINS = {
    "ArgumentError": ValueError,
    "ArgumentMismatchError": ValueError,
    "FetchError": urllib.error.URLError,
    "HTTPStatusError": urllib.error.HTTPError,
    "NetworkError": ConnectionError,
    "FetchTimeoutError": TimeoutError,
    "TruncatedError": OSError,
    "ContentChangedError": OSError,
    "OfflineError": OSError,
    "VerificationError": RuntimeError,
    "DigestMismatchError": RuntimeError,
    "NotACheckpointError": RuntimeError,
    "CacheError": OSError,
    "MissingFileError": FileNotFoundError,
    "LoadError": RuntimeError,
    "UnsafePickleError": pickle.UnpicklingError,
    "DeviceError": RuntimeError,
    "CoordinationError": RuntimeError,
    "ArrivalTimeoutError": TimeoutError,
    "ProgressTimeoutError": TimeoutError,
    "RankLostError": ConnectionError,
    "StoreLostError": ConnectionError,
    "CallCancelledError": RuntimeError,
    "RankFailedError": RuntimeError,
}


def make(kind):
    error = kind("it failed", url="http://host/x.pth", code=404, path="/cache/x.pth", errno=28, expected=None)
    error.rank, error.host = 3, "node1"
    return error


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_is_what_people_catch(kind):
    assert issubclass(kind, RankloadError)
    assert issubclass(kind, BUILTINS.get(kind.__name__, Exception))
    assert kind is RankloadError or kind.__name__ in BUILTINS


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "travel",
    [
        lambda error: pickle.loads(pickle.dumps(error)),
        lambda error: from_wire(json.loads(json.dumps(to_wire(error)))),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "wire", "copy", "deepcopy"],
)
def test_crosses_processes(kind, travel):
    error = make(kind)
    arrived = travel(error)
    assert type(arrived) is kind
    assert str(arrived) == str(error) == "it failed [rank 3 on node1]"
    assert (arrived.fields, arrived.rank, arrived.host) == (error.fields, 3, "node1")
    assert (arrived.url, arrived.code, arrived.expected) == ("http://host/x.pth", 404, None)
    assert arrived.args == ("it failed",)


def test_error_number_and_reason_are_where_code_looks_for_them():
    assert make(rankload.CacheError).errno == 28
    assert make(rankload.FetchError).reason == "it failed"


def test_an_http_error_is_what_urllibs_callers_expect():
    error = make(rankload.errors.HTTPStatusError)
    assert (error.code, error.status, error.msg, error.reason) == (404, 404, "it failed", "it failed")
    assert (error.headers, error.read(), error.url) == (None, b"", "http://host/x.pth")
    error.close()


def test_a_missing_file_is_one_by_its_error_number():
    error = rankload.CacheError("no such file", path="/x", errno=2)
    assert type(error) is rankload.errors.MissingFileError and isinstance(error, FileNotFoundError)
    assert type(make(rankload.CacheError)) is rankload.CacheError


def test_what_a_message_does_not_mention_is_none_and_nothing_else_is_an_attribute():
    error = rankload.CacheError("it failed", path="/x")
    assert (error.path, error.free_bytes) == ("/x", None)
    assert not hasattr(error, "colour")


def raised_fields() -> Iterator[tuple[str, str]]:
    """Yield each class of errors and each field that the package raises it with."""
    for path in Path(rankload.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in vars(errors):
                yield from ((node.func.id, keyword.arg) for keyword in node.keywords if keyword.arg)


@pytest.mark.parametrize(("name", "field"), sorted({*raised_fields()}))
def test_every_field_is_declared_by_its_class(name, field):
    declared = {field for kind in getattr(errors, name).__mro__ for field in vars(kind).get("__annotations__", {})}
    assert field in declared or (field == "errno" and issubclass(getattr(errors, name), OSError))


def test_error_of_another_version():
    wire = {**to_wire(make(rankload.CacheError)), "type": "ErrorOfTomorrow"}
    assert type(from_wire(wire)) is rankload.errors.RankFailedError
    assert "it failed" in str(from_wire(wire))


def test_fields_of_another_version_are_no_attributes():
    fields = {"reason": "x", "__class__": "x", "with_traceback": "x", "path": "/x"}
    error = from_wire({**to_wire(make(rankload.errors.OfflineError)), "fields": fields})
    assert type(error) is rankload.errors.OfflineError and error.fields == fields
    assert error.path == "/x" and error.reason == error.message and callable(error.with_traceback)


def test_long_texts_are_cut_in_the_middle():
    text = "what happened" + "x" * 100_000 + "the cause"
    arrived = from_wire(json.loads(json.dumps(to_wire(rankload.errors.RankFailedError(text, trace=text)))))
    for cut_text in (arrived.message, arrived.trace):
        assert cut_text.startswith("what happened") and cut_text.endswith("the cause")
        assert len(cut_text) < MAX_MESSAGE_CHARACTERS + 100
    assert cut("short") == "short"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_tracebacks_show_the_shortest_name_to_import_it_by(kind):
    home = "rankload" if kind.__name__ in rankload.__all__ else "rankload.errors"
    assert kind.__module__ == home
    assert getattr(importlib.import_module(home), kind.__name__) is kind


def test_tree_is_drawn_completely():
    """The drawing at the top of the module is documentation: every error stands there with its bases."""
    drawn = dict(re.findall(r"[├└]── (\w+)(?: \(([^)]*)\))?", errors.__doc__))
    assert drawn.keys() == {kind.__name__ for kind in ALL if kind is not RankloadError}
    for name, bases in drawn.items():
        mro = [base.__name__ for base in getattr(errors, name).__mro__]
        for base in re.findall(r"\w+Error", bases):
            assert base in mro, f"{name} is no {base}"


HOSTILE = "weight\x1b[2J\r\x08\x9b\u202eevil\u2066\u200b\u2028\x00\udc80\ue000"
SHOWN = r"weight\x1b[2J\r\x08\x9b\u202eevil\u2066\u200b\u2028\x00\udc80\ue000"


def test_what_is_not_printable_is_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("one\ntwo\t") == r"one\ntwo\t"
    assert printable(SHOWN) == SHOWN  # once is enough
    for ordinary in ("", "fc.weight", "größe 重み … 'x' \\x1b", "/cache/ü b.pth"):
        assert printable(ordinary) is ordinary


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_no_error_shows_raw_texts(kind):
    error = kind(f"first\n  {HOSTILE}", path=HOSTILE, names=[HOSTILE], code=404)
    error.rank, error.host = 3, f"node{HOSTILE}"
    for arrived in (error, pickle.loads(pickle.dumps(error)), from_wire(json.loads(json.dumps(to_wire(error))))):
        assert str(arrived).splitlines() == ["first", f"  {SHOWN} [rank 3 on node{SHOWN}]"]
        assert arrived.args == (f"first\n  {SHOWN}",)
        assert arrived.path == SHOWN and arrived.code == 404
    assert error.names == [SHOWN]


def test_a_rank_of_another_version_sends_raw_texts():
    wire = {
        **to_wire(rankload.LoadError("x")),
        "message": HOSTILE,
        "fields": {"path": HOSTILE},
        "rank": 1,
        "host": "h\n",
    }
    arrived = from_wire(wire)
    assert str(arrived) == rf"{SHOWN} [rank 1 on h\n]" and arrived.path == SHOWN
