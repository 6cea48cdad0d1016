"""RANKLOAD_* variables."""

from dataclasses import fields

import pytest

from rankload._errors import ArgumentError
from rankload._settings import Settings, variable


def test_defaults_without_variables():
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.type == "float"])
def test_every_number_can_be_set(name):
    settings = Settings.from_environment({variable(name): "7.5"})
    assert getattr(settings, name) == 7.5
    assert variable(name) == f"RANKLOAD_{name.upper()}"
    assert sum(getattr(settings, field.name) != getattr(Settings(), field.name) for field in fields(Settings)) == 1


@pytest.mark.parametrize("text", ["0", "-1", "soon", "", "nan", "inf", "1 s"])
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
