"""The lease, when a signal comes at the wrong moment."""

from __future__ import annotations

import pytest
from filelock import SoftFileLease

from rankload._cache.lease import hold_lease
from rankload._settings import Settings


class Interrupted(BaseException):
    pass


def hold(path, on_wait=lambda: False):
    return hold_lease(path, Settings(lease_seconds=30), progress_mark=lambda: 0, on_wait=on_wait)


def test_a_signal_just_after_it_was_acquired_does_not_keep_it(tmp_path, monkeypatch):
    """Its heartbeat would go on: the next call in this process, and every other job, would wait for minutes."""
    acquire = SoftFileLease.acquire

    def acquire_and_be_interrupted(self, *args, **kwargs):
        acquire(self, *args, **kwargs)
        raise Interrupted

    path = tmp_path / "file.lease"
    with monkeypatch.context() as patched:
        patched.setattr(SoftFileLease, "acquire", acquire_and_be_interrupted)
        with pytest.raises(Interrupted), hold(path):
            pass
    assert not path.exists()
    with hold(path) as is_held:
        assert is_held and path.exists()
    assert not path.exists()
