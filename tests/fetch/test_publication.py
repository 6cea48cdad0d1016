"""A file appears under its final name whole and verified, or not at all; and what the directory holds meanwhile."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rankload
from harness.fetch_calls import fetch, fetch_and_mark, files_in, left_in
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.scripts import run_script, start_script
from rankload._cache.layout import Entry
from rankload._fetch.partials.owner import partials_of
from rankload._fetch.partials.partial import Partial
from rankload._fetch.partials.resume import remove_dead_partials
from rankload._settings import Settings

HALF = 4 << 20


def fetch_with_umask(rank, url, model_dir, umask):
    os.umask(umask)
    return fetch(rank, url, model_dir)


def fetch_to(rank, url, destination):
    try:
        rankload.hub.download_url_to_file(url, destination)
    except rankload.CacheError as error:
        return str(error)


def test_only_the_partial_is_there_during_the_download(origin, cache, big_content):
    url = origin.add("file.bin", big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 2, args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        names = files_in(cache)
        assert not (cache / "file.bin").exists()
        assert sum(name.endswith(".partial") for name in names) == 1, names
        origin.release("file.bin")
        assert {result.value for result in group.wait()} == {big_content}
    assert sorted(files_in(cache)) == [".rankload/file.bin.json", "file.bin"]


def test_partial_is_private_to_its_owner_and_in_the_final_directory(tmp_path):
    entry = Entry(tmp_path / "file.bin")
    with Partial(entry, Settings()) as one, Partial(entry, Settings()) as other:
        assert one.path != other.path
        assert one.path.parent == other.path.parent == tmp_path
        assert not os.get_inheritable(one.descriptor)
        assert set(partials_of(entry)) == {one.path, other.path}
    assert files_in(tmp_path) == []


def test_symlink_planted_at_the_partial_name_is_refused(tmp_path, monkeypatch):
    """Whoever guesses the name must not make us write elsewhere. The one thing forced here is the guess."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "ab" * count)
    entry, victim = Entry(tmp_path / "cache" / "file.bin"), tmp_path / "victim"
    entry.path.parent.mkdir()
    victim.write_bytes(b"precious")
    with Partial(entry, Settings()) as partial:
        name = partial.path
    name.symlink_to(victim)
    with pytest.raises(rankload.CacheError, match="File exists"):
        Partial(entry, Settings())
    assert victim.read_bytes() == b"precious" and name.is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(origin, cache, umask):
    url = origin.add("file.bin", b"content")
    [result] = run_ranks(fetch_with_umask, 1, env="none", args=(url, cache, umask))
    assert stat.S_IMODE(Path(result.value).stat().st_mode) == 0o644 & ~umask  # a mapped file must not change


def test_group_of_a_setgid_directory_is_kept(origin, cache):
    cache.mkdir()
    os.chown(cache, -1, _another_group())
    cache.chmod(0o2775)
    url = origin.add("file.bin", b"content")
    [result] = run_ranks(fetch_with_umask, 1, env="none", args=(url, cache, 0o002))
    status = Path(result.value).stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (_another_group(), 0o644)


def test_destination_that_cannot_be_replaced_leaves_no_partial(origin, tmp_path):
    target = tmp_path / "target"
    url = origin.add("file.bin", b"content", hold_at=3)
    with start_ranks(fetch_to, 1, env="none", args=(url, str(target))) as group:
        origin.wait_until_held("file.bin")
        target.mkdir()
        origin.release("file.bin")
        assert "Is a directory" in group.wait()[0].value
    assert files_in(tmp_path) == []


def test_directory_in_the_place_of_the_file(origin, cache):
    (cache / "file.bin").mkdir(parents=True)
    with pytest.raises(rankload.CacheError, match=r"file_name="):
        rankload.dist_fetch(origin.add("file.bin", b"content"), cache)
    assert origin.request_count() == 0


def test_sigterm_during_the_download_leaves_nothing(origin, cache, big_content):
    url = origin.add("file.bin", big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        group.kill(0, signal.SIGTERM)
        assert group.wait_for_end(0, 5).exitcode == -signal.SIGTERM
    assert files_in(cache) == []


def test_sigterm_during_a_plain_download_leaves_what_was_there(origin, tmp_path, big_content):
    url, target = origin.add("file.bin", big_content, hold_at=HALF), tmp_path / "there" / "file.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    code = f"import rankload; rankload.hub.download_url_to_file({url!r}, {str(target)!r})"
    with start_script(code) as program:
        origin.wait_until_held("file.bin")
        program.kill(signal.SIGTERM)
        assert program.wait(20).exitcode == -signal.SIGTERM
    assert files_in(target.parent) == ["file.bin"] and target.read_bytes() == b"old"


def test_partial_of_a_killed_process_is_removed_by_the_next(origin, cache, big_content):
    url = origin.add("file.bin", big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        group.kill(0)
        group.wait_for_end(0)
    assert len(left_in(cache)) == 2  # the partial and the lease
    url = origin.add("file.bin", big_content)
    [result] = run_ranks(fetch_and_mark, 1, env="none", args=(url, cache))
    assert result.value == big_content
    assert left_in(cache) == []


def test_partial_of_a_living_process_is_kept(tmp_path):
    entry = Entry(tmp_path / "file.bin")
    with _partial_owner(entry) as owner:
        remove_dead_partials(entry, Settings(), time.time())
        assert len(partials_of(entry)) == 1
        owner.kill()
        # not waited for: the owner is a zombie now, which writes no more
        wait_until(lambda: _state(owner.pid) == "Z", 10, "the owner is a zombie")
        remove_dead_partials(entry, Settings(), time.time())
        assert partials_of(entry) == []


def test_partial_of_another_host_is_kept_for_a_day(tmp_path):
    entry = Entry(tmp_path / "file.bin")
    foreign = tmp_path / f"file.bin.0123abcd-{2**22}-77-0123abcd.partial"
    foreign.touch()
    remove_dead_partials(entry, Settings(), time.time())
    assert foreign.exists()
    os.utime(foreign, (foreign.stat().st_mtime - 25 * 3600,) * 2)
    remove_dead_partials(entry, Settings(), time.time())
    assert not foreign.exists()


def test_foreign_files_are_not_taken_for_partials(tmp_path):
    entry = Entry(tmp_path / "file.bin")
    for name in ("file.bin.partial", "file.bin.1-2-3.partial", "other.bin.0123abcd-4194304-77-0123abcd.partial"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    remove_dead_partials(entry, Settings(), time.time())
    assert len(files_in(tmp_path)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts and changes user")
def test_partial_of_another_user_is_kept_where_proc_hides_processes(tmp_path):
    """Under hidepid a living process of somebody else looks as if it were not there."""
    tmp_path.chmod(0o777)
    entry = Entry(tmp_path / "file.bin")
    with Partial(entry, Settings()):
        code = f"""
import os, subprocess, time
os.chdir({str(tmp_path)!r})  # the folders above are closed to others
subprocess.run(["mount", "-o", "remount,hidepid=2", "/proc"], check=True)
from pathlib import Path
from rankload._cache.layout import Entry
from rankload._fetch.partials.resume import remove_dead_partials
from rankload._fetch.partials.owner import partials_of
from rankload._settings import Settings
os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert not Path("/proc/{os.getpid()}").exists()
entry = Entry(Path("file.bin"))
assert len(partials_of(entry)) == 1
remove_dead_partials(entry, Settings(), time.time())
"""
        subprocess.run(["unshare", "-m", sys.executable, "-c", code], check=True, timeout=60)
        assert len(partials_of(entry)) == 1


def test_file_removed_under_the_download_is_fetched_again(origin, cache, big_content):
    """Somebody clears the cache directory while it is in use, or has taken this process for dead."""
    url = origin.add("file.bin", big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        [partial] = cache.glob("*.partial")
        partial.unlink()
        origin.release("file.bin")
        assert group.wait()[0].value == big_content
    assert origin.request_count() == 2


def test_long_file_names(origin, cache):
    name = "n" * 240 + ".bin"
    url = origin.add(name, b"content")
    assert rankload.dist_fetch(url, cache).read_bytes() == b"content"
    assert rankload.dist_fetch(url, cache).name == name
    assert origin.request_count() == 1


def test_name_of_a_partial_tells_its_owner(origin, cache, big_content):
    url = origin.add("file.bin", big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        [partial] = cache.glob("*.partial")
        assert re.fullmatch(rf"file\.bin\.[0-9a-f]{{8}}-{group.pids[0]}-\d+-[0-9a-f]{{8}}\.partial", partial.name)
        origin.release("file.bin")
        group.wait()


def test_cache_directory_is_made(origin, tmp_path):
    path = rankload.dist_fetch(origin.add("file.bin", b"content"), tmp_path / "a" / "b", file_name="c/d.bin")
    assert path == tmp_path / "a" / "b" / "c" / "d.bin"


def test_interpreter_leaves_while_nothing_hangs(origin, cache):
    """A call that fails leaves no thread behind that would keep the process."""
    url = origin.add("file.bin", b"x" * 100, truncate_at=50, ranges="ignored")
    code = f"""
import threading, rankload
try:
    rankload.dist_fetch({url!r}, {str(cache)!r})
except rankload.errors.TruncatedError:
    print([thread.name for thread in threading.enumerate()])
"""
    assert run_script(code).check().stdout.strip() == "['MainThread']"


def _another_group() -> int:
    return 12345 if os.geteuid() == 0 else next(group for group in [*os.getgroups(), os.getegid()])


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class _partial_owner:
    """A process that holds a partial file until it is killed; reaped at the end."""

    def __init__(self, entry: Entry) -> None:
        self._code = f"""
from pathlib import Path
import sys
from rankload._cache.layout import Entry
from rankload._fetch.partials.partial import Partial
from rankload._settings import Settings
partial = Partial(Entry(Path({str(entry.path)!r})), Settings())
print("there", flush=True)
sys.stdin.read()
"""

    def __enter__(self) -> subprocess.Popen:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout.readline() == b"there\n"
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85], ids=["ascii", "utf-8"])
def test_files_of_one_long_name(origin, cache, name):
    """The name of a record is as long again, and more: it must not be missing."""
    for number in range(2):
        content = b"content %d" % number
        path = rankload.dist_fetch(origin.add(f"{number}.bin", content), cache, file_name=name)
        assert (path.name, path.read_bytes()) == (name, content)
