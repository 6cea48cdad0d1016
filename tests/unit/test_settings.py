"""RANKLOAD_* variables."""

import logging
from dataclasses import fields

import pytest

import rankload
from rankload._api import call as _call
from rankload._settings import Settings, misspelt, variable
from rankload.errors import ArgumentError


def test_defaults_without_variables():
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.type == "float"])
def test_every_number_can_be_set(name):
    settings = Settings.from_environment({variable(name): "7.5"})
    assert getattr(settings, name) == 7.5
    assert variable(name) == f"RANKLOAD_{name.upper()}"
    assert sum(getattr(settings, field.name) != getattr(Settings(), field.name) for field in fields(Settings)) == 1


@pytest.mark.parametrize("text", ["0", "-1", "soon", "", "nan", "inf", "1 s", "1e10"])
def test_number_that_cannot_be(text):
    with pytest.raises(ArgumentError) as caught:
        Settings.from_environment({"RANKLOAD_LEASE_SECONDS": text})
    assert f"RANKLOAD_LEASE_SECONDS={text!r}: expected a positive number of seconds" in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("", False)])
def test_offline(text, value):
    assert Settings.from_environment({"RANKLOAD_OFFLINE": text}).offline is value


def test_offline_that_cannot_be():
    with pytest.raises(ArgumentError, match="RANKLOAD_OFFLINE='maybe': expected 1 or 0"):
        Settings.from_environment({"RANKLOAD_OFFLINE": "maybe"})


def test_lease_may_miss_two_heartbeats():
    assert Settings(lease_seconds=30).lease_heartbeat_seconds * 3 == 30


WHOLE = {field.name for field in fields(Settings) if field.type == "int"}
MAY_BE_ZERO = {"max_bytes", "retries", "minimum_bytes_per_second"}


def test_whole_numbers_are_those_that_count_things():
    assert sorted(WHOLE) == [
        "chunk_bytes", "hash_prefix_digits", "max_bytes", "minimum_bytes_per_second", "retries", "streams",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_whole_number_can_be_set(name):
    settings = Settings.from_environment({variable(name): " 7 "})
    assert getattr(settings, name) == 7 and type(getattr(settings, name)) is int


def test_whole_number_that_is_too_long():
    with pytest.raises(ArgumentError, match="RANKLOAD_STREAMS"):
        Settings.from_environment({"RANKLOAD_STREAMS": "1" * 5000})


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_zero_where_it_makes_sense(name):
    if name in MAY_BE_ZERO:
        assert getattr(Settings.from_environment({variable(name): "0"}), name) == 0
    else:
        with pytest.raises(ArgumentError, match=f"{variable(name)}='0': expected a whole number, at least 1"):
            Settings.from_environment({variable(name): "0"})


@pytest.mark.parametrize("text", ["-1", "1.5", "1e3", "many", "", "0x10", "1_000", "8 MiB", "½"])
def test_whole_number_that_cannot_be(text):
    with pytest.raises(ArgumentError) as caught:
        Settings.from_environment({"RANKLOAD_CHUNK_BYTES": text})
    assert f"RANKLOAD_CHUNK_BYTES={text!r}: expected a whole number, at least 1" in str(caught.value)


def test_the_first_wrong_variable_is_named_whatever_else_is_set():
    with pytest.raises(ArgumentError, match="RANKLOAD_STREAMS"):
        Settings.from_environment({"RANKLOAD_RETRIES": "3", "RANKLOAD_STREAMS": "no", "HOME": "/"})


def test_misspelt_variables():
    environ = {
        "RANKLOAD_RETRY": "3",
        "RANKLOAD_PROGRES_SECONDS": "60",
        "RANKLOAD_RETRIES": "3",
        "RANKLOAD_URL": "https://host/file.pth",  # a job script's own
        "RANKLOAD_MODEL_DIR": "/cache",
        "RANKLOAD_PYTHON": "python3",
        "RETRIES": "3",
    }
    assert misspelt(environ) == {
        "RANKLOAD_PROGRES_SECONDS": "RANKLOAD_PROGRESS_SECONDS",
        "RANKLOAD_RETRY": "RANKLOAD_RETRIES",
    }


def test_misspelt_variable_is_warned_of_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKLOAD_STREAM", "3")
    _call._warn_of_misspelt_variables.cache_clear()
    file = tmp_path / "file.bin"
    file.write_bytes(b"content")
    with caplog.at_level(logging.WARNING, "rankload"):
        for _ in range(2):
            rankload.dist_fetch(file)
    assert caplog.messages == [
        "RANKLOAD_STREAM is set, but rankload has no setting of that name; did you mean RANKLOAD_STREAMS?"
    ]
