"""What may be in a cache, after whatever happened."""

from __future__ import annotations

from pathlib import Path

from harness.fetch_calls import files_in


def assert_published_is(path: Path, *contents: bytes) -> bool:
    """If there is a file of the final name, it has all its bytes. Returns whether there is."""
    if not path.exists():
        return False
    found = path.read_bytes()
    assert found in contents, f"{path}: {len(found)} bytes, and not the right ones"
    return True


def assert_clean(cache: Path, name: str, *, after_a_hit: bool = False) -> None:
    """Nothing is left over but the file and its record.

    Args:
        after_a_hit: The last call has found the file published. It writes nothing, so the journal and the lease of a
            process that was killed just after publishing stay until the next download.
    """
    files = set(files_in(cache))
    if after_a_hit:
        files -= {file for file in files if file.endswith((".partial.journal", ".lease"))}
    assert files == {f".rankload/{name}.json", name}


def assert_nothing_but_resumable(cache: Path, name: str) -> None:
    """After a failed call: a partial file that a later one can go on with, what was set aside, and no more."""
    files = set(files_in(cache)) if cache.exists() else set()
    kept = {name, f".rankload/{name}.json", f".rankload/quarantine/{name}", f".rankload/quarantine/{name}.json"}
    partials = {file for file in files if file.endswith(".partial")}
    journals = {file for file in files if file.endswith(".partial.journal")}
    assert files - kept - partials - journals == set()
    assert journals == {f"{file}.journal" for file in partials}, "a partial file and its journal go together"
    assert all("-0-0-" in file for file in partials), "somebody still owns one"
