"""Which failures are worth another try, and after how long."""

from __future__ import annotations

import pytest

from rankload._fetch.transfer.retry import Retries, is_temporary
from rankload._settings import Settings
from rankload.errors import (
    ContentChangedError,
    FetchError,
    FetchTimeoutError,
    HTTPStatusError,
    NetworkError,
    OfflineError,
    TruncatedError,
)

SETTINGS = Settings(retries=5, backoff_seconds=1.0, retry_after_seconds=300.0)


def status(code: int, **fields: object) -> HTTPStatusError:
    return HTTPStatusError(f"HTTP Error {code}", code=code, **fields)


TEMPORARY = [status(code) for code in (408, 425, 429, 500, 502, 503, 504, 507, 520, 599)] + [
    NetworkError("reset"),
    NetworkError("reset", is_permanent=False),
    FetchTimeoutError("silence"),
    TruncatedError("cut"),
]
PERMANENT = [status(code) for code in (400, 401, 403, 404, 405, 410, 412, 416, 451, 501, 505)] + [
    NetworkError("no such host", is_permanent=True),
    FetchError("encoded"),
    ContentChangedError("changed"),
    OfflineError("offline"),
]


@pytest.mark.parametrize("error", TEMPORARY, ids=str)
def test_worth_another_try(error):
    assert is_temporary(error)
    assert Retries(SETTINGS).pause_after(error) > 0


@pytest.mark.parametrize("error", PERMANENT, ids=str)
def test_not_worth_another_try(error):
    assert not is_temporary(error)
    with pytest.raises(type(error)) as caught:
        Retries(SETTINGS).pause_after(error)
    assert caught.value is error


@pytest.fixture(params=[0.5, 0.77, 1.0])
def jitter(request, monkeypatch):
    """The factor that was drawn."""
    monkeypatch.setattr("random.uniform", lambda low, high: (low, high) == (0.5, 1.0) and request.param)
    return request.param


def test_pauses_double_with_jitter_up_to_a_minute(jitter):
    retries = Retries(Settings(retries=10, backoff_seconds=1.0))
    pauses = [retries.pause_after(TruncatedError("cut")) for _ in range(10)]
    assert pauses == [min(jitter * 2**number, 60) for number in range(10)]


def test_jitter_is_drawn_each_time():
    pauses = {Retries(SETTINGS).pause_after(TruncatedError("cut")) for _ in range(50)}
    assert len(pauses) > 40 and 0.5 <= min(pauses) < 0.7 < 0.8 < max(pauses) <= 1.0


@pytest.mark.parametrize(
    ("asked", "least"), [(0, 0), (7.5, 7.5), (300, 300), (301, 300), (1e9, 300), (float("inf"), 300)]
)
def test_retry_after_holds_up_to_the_cap(jitter, asked, least):
    """And a little later than asked: all that were told the same second must not come in that second."""
    retries = Retries(SETTINGS)
    for number in range(5):
        extra = min(jitter * 2**number, 1.0)
        assert retries.pause_after(status(429, retry_after_seconds=asked)) == pytest.approx(least + extra)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_as_many_failures_in_a_row_as_the_setting_says(count):
    retries, error = Retries(Settings(retries=count)), TruncatedError("cut")
    for _ in range(3):
        for _ in range(count):
            retries.pause_after(error)
        retries.succeeded()
    for _ in range(count):
        retries.pause_after(error)
    with pytest.raises(TruncatedError) as caught:
        retries.pause_after(error)
    assert caught.value is error


def test_what_comes_along_with_a_failure_does_not_count():
    retries, error = Retries(Settings(retries=1, backoff_seconds=1.0)), TruncatedError("cut")
    for _ in range(20):
        assert 0 < retries.pause_after(error, is_new=False) <= 1
    retries.pause_after(error)
    assert 0 < retries.pause_after(error, is_new=False) <= 1
    with pytest.raises(TruncatedError):
        retries.pause_after(error)


def test_a_setting_that_means_for_ever():
    retries = Retries(Settings(retries=3000))
    assert {retries.pause_after(NetworkError("reset")) for _ in range(3000)} >= {60.0}
