"""What an origin can make rankload write, and what it finds in a cache that others write to as well."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import itertools
import json
import os
import resource
import signal
import stat
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rankload
import rankload.hub
from harness import mounts
from harness.checkpoints import digest_of
from harness.fetch_calls import files_in, left_in, load
from harness.nodes import become_node
from harness.origin import Origin, Reply
from harness.ranks import run_ranks
from harness.users import ALICE, BOB, GROUP, acting_as, public_directory
from rankload._cache import access
from rankload._cache.layout import Entry
from rankload._fetch import download
from rankload._fetch import lookup as cached
from rankload._fetch.hub_names import HubRepository
from rankload._fetch.hub_weights import OwnMemory
from rankload._fetch.partials.owner import own_path
from rankload._load.node import node_copy
from rankload._platform import linux
from rankload._platform.linux import birth_ns
from rankload._urls import Url, url_key

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users")

GOOD, EVIL = torch.ones(2), torch.full((2,), 666.0)
INDEX = "model.safetensors.index.json"


def checkpoint_of(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Boom:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def evil():
    with Origin() as server:
        yield server


@pytest.fixture
def good_url(origin):
    return origin.add("models/victim.pth", checkpoint_of({"w": GOOD}))


def planting_index(evil: Origin, parts: dict[str, bytes], name: str) -> str:
    """An index below ``any/`` whose parts are called so, and are all there."""
    for part, content in parts.items():
        evil.add(f"any/{part}", content)
    return evil.add(
        f"any/{name}", json.dumps({"weight_map": {str(at): part for at, part in enumerate(parts)}}).encode()
    )


def content_of(cache: Path) -> dict[str, bytes]:
    return {name: (cache / name).read_bytes() for name in files_in(cache) if (cache / name).is_file()}


# --- an origin -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(59)
@pytest.mark.parametrize("index_name", ["foo.pth", "foo.json", INDEX, "foo.index.json", "foo.index.fp16.json"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_origin_cannot_plant_a_file(origin, evil, cache, good_url, tmp_path, index_name, is_cached):
    """The next load of another URL gets that URL's own weights, and runs nothing, whatever the last one has sent."""
    if is_cached:
        rankload.dist_fetch(good_url, cache)
    else:
        cache.mkdir()
    before = content_of(cache)
    key, mark = url_key(good_url)[:16], str(tmp_path / "mark")
    bad = checkpoint_of({"w": EVIL, "x": Boom(mark)})
    names = [
        "victim.pth", "../victim.pth", f".rankload/{key}/victim.pth", ".rankload/victim.pth.json",
        ".rankload/victim.pth.json/x", ".rankload/victim.pth.lease", f".rankload/{key}/.rankload/victim.pth.json/x",
        "./victim.pth", "sub/victim.pth", ".RANKLOAD/x", "..", "a\\b", "a\nb", "\u202ehtp.mitciv", "-rf", " victim.pth",
        "victim.pth ", "victim.pth.00000000-0-0-00000000.partial", "x" * 300, "/etc/x", "a//b", "a/", "",
    ]  # fmt: skip
    for number, name in enumerate(names):
        evil.add(f"any/{number}/ok.bin", bad)
        if name and ".." not in name and not name.startswith("/"):
            evil.add(f"any/{number}/{name}", bad)
        index = json.dumps({"weight_map": {"a": "ok.bin", "w": name}}).encode()
        url = evil.add(f"any/{number}/{index_name}", index)
        for call in (rankload.dist_load_state_dict_from_url, rankload.dist_fetch):
            with contextlib.suppress(rankload.RankloadError):
                call(url, str(cache), progress=False)
        assert {file: (cache / file).read_bytes() for file in before} == before, name
        assert not (cache / "victim.pth").exists() or is_cached, name
    for _ in range(2):
        loaded = rankload.hub.load_state_dict_from_url(good_url, str(cache), progress=False)
        assert torch.equal(loaded["w"], GOOD)
    assert not os.path.exists(mark)
    assert origin.request_count() == 1
    own = [path for path in tmp_path.rglob("*") if path.name in ("x", "sub") or path.name.startswith("-")]
    assert own == []


def test_index_under_another_name_is_an_ordinary_file_or_refused(evil, cache):
    """Nobody looks for parts beside it: those that lie there are another URL's."""
    other = evil.add("other/w.bin", checkpoint_of({"w": GOOD}))
    rankload.dist_fetch(other, cache)
    url = planting_index(evil, {"w.bin": checkpoint_of({"w": EVIL})}, "foo.pth")
    with pytest.raises(rankload.errors.NotACheckpointError, match=r"pass file_name='….index.json'"):
        rankload.dist_load_state_dict_from_url(url, cache)
    assert "foo.pth" not in files_in(cache)
    path = rankload.dist_fetch(url, cache)  # somebody's JSON
    assert path == cache / "foo.pth" and json.loads(path.read_text())["weight_map"] == {"0": "w.bin"}
    with pytest.raises(rankload.errors.NotACheckpointError):  # and is no checkpoint for being cached
        rankload.dist_load_state_dict_from_url(url, cache)
    assert evil.request_count("any/w.bin") == 0


def test_part_that_is_an_index_is_refused(evil, cache):
    inner = json.dumps({"weight_map": {"w": "victim.pth"}}).encode()
    url = planting_index(evil, {"part.safetensors": inner}, INDEX)
    with pytest.raises(rankload.errors.NotACheckpointError, match=r"part\.safetensors"):
        rankload.dist_load_state_dict_from_url(url, cache)


@pytest.mark.fault(60)
@pytest.mark.parametrize(
    "content", [b"", b"notes of mine", b"\x80\x02}q\x00.", json.dumps({"weight_map": {}}).encode()]
)
@pytest.mark.parametrize("kwargs", [{}, {"sha256": "0" * 64}, {"verify": "always"}])
def test_users_file_is_never_moved_or_replaced(origin, good_url, tmp_path, content, kwargs):
    """``model_dir`` may be anybody's project."""
    project = tmp_path / "project"
    project.mkdir()
    mine = project / "victim.pth"
    mine.write_bytes(content)
    before = mine.stat()
    for _ in range(2):
        try:
            loaded = rankload.dist_load_state_dict_from_url(good_url, project, **kwargs)
            assert torch.equal(loaded["w"], GOOD)
        except rankload.errors.DigestMismatchError:
            assert "sha256" in kwargs
    after = mine.stat()
    assert mine.read_bytes() == content
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


@pytest.mark.fault(60)
def test_users_file_that_has_taken_a_cached_ones_place_stays(origin, cache, good_url):
    """It has another inode than what was published; a file that was only damaged has not, and is replaced."""
    path = rankload.dist_fetch(good_url, cache)
    mine = cache / "mine"
    mine.write_bytes(b"my own, renamed into place")
    mine.replace(path)
    for kwargs in ({}, {"verify": "always"}, {"verify": "never"}, {"sha256": "0" * 64}):
        try:
            loaded = rankload.dist_load_state_dict_from_url(good_url, cache, **kwargs)
            assert torch.equal(loaded["w"], GOOD)
        except rankload.errors.DigestMismatchError:
            assert "sha256" in kwargs
        assert path.read_bytes() == b"my own, renamed into place"


@pytest.mark.fault(59)
@pytest.mark.parametrize("with_name", [True, False])
def test_url_cannot_have_the_name_of_a_partial_file(origin, evil, cache, good_url, with_name):
    """With its journal, as a second URL, it would be the beginning of another URL's file."""
    bad, stem = checkpoint_of({"w": EVIL}), "victim.pth.00000000-0-0-00000000.partial"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    content = {"url_key": url_key(good_url), "size_bytes": len(bad), "etag": '"e"', "last_modified": None}
    head = {"journal": 1, "boot": boot, "sha256": None, **content}
    planted = {stem: bad, f"{stem}.journal": f"{json.dumps(head)}\n[0, {len(bad)}]\n".encode()}
    for name, content in planted.items():
        url, file_name = (evil.add("x.bin", content), name) if with_name else (evil.add(name, content), None)
        with pytest.raises(rankload.ArgumentError, match="rankload's own"):
            rankload.dist_fetch(url, cache, file_name=file_name)
    assert files_in(cache) == [] and evil.request_count() == 0
    assert rankload.dist_load_state_dict_from_url(good_url, cache)["w"].equal(GOOD)


@pytest.mark.fault(60)
def test_cached_file_that_somebody_has_emptied_is_not_anothers(origin, evil, cache, good_url):
    """It was downloaded again and again, and never published."""
    other_url = evil.add("models/victim.pth", checkpoint_of({"w": EVIL}))
    os.truncate(rankload.dist_fetch(good_url, cache), 0)
    results = run_ranks(load, 2, args=(other_url, str(cache)), timeout_seconds=40)
    assert {result.value for result in results} == {digest_of({"w": EVIL})}
    assert evil.request_count() == 1
    assert rankload.dist_load_state_dict_from_url(good_url, cache)["w"].equal(GOOD)


def fetch_while_somebody_cleans_up(rank: int, url: str, cache: str) -> str:
    """Every look at the free space of a partial file is the last that it is there for."""
    from rankload._fetch.partials.partial import Partial

    def look_then_remove(partial: Partial, size_bytes: int) -> None:
        looked(partial, size_bytes)
        partial.path.unlink()

    looked, Partial._check_space = Partial._check_space, look_then_remove
    try:
        rankload.dist_fetch(url, cache, progress=False)
    except rankload.CacheError as error:
        return str(error)
    return ""


def test_partial_files_that_are_always_removed_end_in_an_error(origin, good_url, cache):
    """Not in downloads without an end."""
    results = run_ranks(fetch_while_somebody_cleans_up, 2, args=(good_url, str(cache)), timeout_seconds=60)
    assert all("failed like this: 5)" in result.value for result in results)
    assert origin.request_count() == 5


def test_folder_of_parts_is_one_urls_alone(origin, evil, cache):
    """What lies in it that rankload did not publish stays, and is an error."""
    url = planting_index(origin, {"w.bin": checkpoint_of({"0": GOOD})}, INDEX)
    folder = rankload.dist_fetch(url, cache).parent
    assert folder.name == f"model.safetensors-{url_key(url)[:16]}"
    (folder / "mine").write_bytes(b"mine")
    (folder / "mine").replace(folder / "w.bin")
    with pytest.raises(rankload.CacheError, match=r"w\.bin is not the part that"):
        rankload.dist_load_state_dict_from_url(url, cache)
    assert (folder / "w.bin").read_bytes() == b"mine"


@pytest.mark.fault(28)
@pytest.mark.parametrize("level", ["index folder", "sub", "sub/sub", "own directory of sub"])
@pytest.mark.parametrize("is_dangling", [False, True])
def test_symbolic_link_on_any_level(origin, cache, good_url, tmp_path, level, is_dangling):
    cache.mkdir()
    elsewhere = tmp_path / "elsewhere"
    if not is_dangling:
        elsewhere.mkdir()
    arguments = {} if level == "index folder" else {"file_name": "sub/sub/victim.pth"}
    url = planting_index(origin, {"w.bin": checkpoint_of({"0": GOOD})}, INDEX) if not arguments else good_url
    link = {
        "index folder": cache / f"model.safetensors-{url_key(url)[:16]}",
        "sub": cache / "sub",
        "sub/sub": cache / "sub" / "sub",
        "own directory of sub": cache / "sub" / "sub" / ".rankload",
    }[level]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(rankload.CacheError, match="is a symbolic link: refused"):
        rankload.dist_load_state_dict_from_url(url, cache, **arguments)
    assert elsewhere.exists() != is_dangling
    assert is_dangling or list(elsewhere.iterdir()) == []
    assert origin.request_count() == 0


@pytest.mark.fault(28)
def test_link_that_takes_the_place_of_rankloads_directory_as_a_record_is_written(
    cache, good_url, tmp_path, monkeypatch
):
    """The directory's owner can do that, where everybody can write. A file of the user's has a record's name."""
    mine = tmp_path / "mine" / "victim.pth.json"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")

    def look_then_swap(directory: Path) -> None:
        looked(directory)
        directory.rename(cache / "before")
        directory.symlink_to(mine.parent)

    rankload.dist_fetch(good_url, tmp_path / "other")  # what is imported late has the function by its name
    looked = access.make_own_directory
    monkeypatch.setattr(access, "make_own_directory", look_then_swap)
    with pytest.raises(rankload.CacheError, match="cannot write"):
        rankload.dist_fetch(good_url, cache)
    assert mine.read_bytes() == b"mine"
    assert os.listdir(mine.parent) == [mine.name]


@pytest.mark.fault(61)
def test_nothing_is_published_without_a_record(origin, cache, good_url):
    """Something stands in the record's place: another URL of this name would get the file."""
    (cache / ".rankload" / "victim.pth.json" / "x").mkdir(parents=True)
    with pytest.raises(rankload.CacheError, match=r"victim\.pth\.json"):
        rankload.dist_fetch(good_url, cache)
    assert not (cache / "victim.pth").exists()
    assert [name for name in files_in(cache) if "partial" in name] == []


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_published_file_is_not_writable_by_others(good_url, cache, umask):
    before = os.umask(umask)
    try:
        path = rankload.dist_fetch(good_url, cache)
    finally:
        os.umask(before)
    for one in (path, cache / ".rankload" / "victim.pth.json"):
        assert not stat.S_IMODE(one.stat().st_mode) & 0o022


@pytest.mark.fault(60)
@pytest.mark.parametrize("content", [b"my own", b""])
def test_users_file_that_has_got_a_cached_ones_inode_number_stays(origin, cache, good_url, content):
    """The cached file was removed, and its number is free for the next: by the number alone it would be rankload's."""
    path = rankload.dist_fetch(good_url, cache)
    path.unlink()
    path.write_bytes(content)
    if birth_ns(path) is None:
        pytest.skip("this filesystem does not keep when a file was made")
    record = cache / ".rankload" / "victim.pth.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "inode": path.stat().st_ino}))
    for kwargs in ({}, {"verify": "always"}, {"verify": "never"}):
        assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache, **kwargs)["w"], GOOD)
        assert path.read_bytes() == content
    assert files_in(cache / ".rankload" / "quarantine") == []


def test_record_without_the_time_of_birth_still_speaks_for_its_file(origin, cache, good_url):
    """As earlier versions wrote it. The file is damaged."""
    path = rankload.dist_fetch(good_url, cache)
    record = cache / ".rankload" / "victim.pth.json"
    facts = json.loads(record.read_text())
    del facts["birth_ns"]
    record.write_text(json.dumps(facts))
    path.write_bytes(b"damaged")
    assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache)["w"], GOOD)
    assert path.stat().st_size == facts["size_bytes"]


@pytest.mark.fault(60)
@pytest.mark.parametrize("verify", ["once", "never"])
@pytest.mark.parametrize("mine", [b"mine", checkpoint_of({"w": EVIL})], ids=["short", "of the same size"])
@pytest.mark.parametrize("filesystem", ["local", "without links"])
def test_users_file_that_comes_as_the_download_is_published_stays(
    origin, cache, good_url, monkeypatch, verify, mine, filesystem
):
    """It gets its name when all has been looked at, while the record is written."""
    write = download._write_record
    if filesystem == "without links":
        monkeypatch.setattr(linux, "_renameat2", lambda *_: ctypes.set_errno(errno.EINVAL) or -1)
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))

    def write_slowly(*arguments):
        write(*arguments)
        if not (cache / "victim.pth").exists():
            (cache / "victim.pth").write_bytes(mine)

    monkeypatch.setattr(download, "_write_record", write_slowly)
    for _ in range(2):
        assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache, verify=verify)["w"], GOOD)
        assert (cache / "victim.pth").read_bytes() == mine
    assert [name for name in files_in(cache) if "partial" in name] == []


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.fault(60)
def test_users_file_that_replaces_the_old_one_as_the_new_one_is_published_stays(origin, cache, good_url, monkeypatch):
    path = rankload.dist_fetch(good_url, cache)
    os.truncate(path, 0)
    write = download._write_record

    def write_slowly(*arguments):
        write(*arguments)
        (cache / "mine").write_bytes(b"mine")
        (cache / "mine").replace(path)
        monkeypatch.setattr(download, "_write_record", write)

    monkeypatch.setattr(download, "_write_record", write_slowly)
    assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache)["w"], GOOD)
    assert path.read_bytes() == b"mine"


@pytest.mark.fault(60)
def test_users_file_that_replaces_a_damaged_one_is_not_set_aside(origin, cache, good_url, monkeypatch):
    """It comes after the look that has found the damage."""
    path = rankload.dist_fetch(good_url, cache)
    os.truncate(path, 10)
    set_aside = cached.quarantine

    def set_aside_late(*arguments):
        (cache / "mine").write_bytes(b"mine")
        (cache / "mine").replace(path)
        return set_aside(*arguments)

    monkeypatch.setattr(cached, "quarantine", set_aside_late)
    assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache)["w"], GOOD)
    assert path.read_bytes() == b"mine"


@pytest.mark.fault(60)
@pytest.mark.parametrize("filesystem", ["nfs", "nfs that answers twice", "without links"])
def test_file_is_renamed_to_no_name_that_is_taken(tmp_path, monkeypatch, filesystem):
    """Where there is no renameat2(2)."""
    monkeypatch.setattr(linux, "_renameat2", None)
    link = os.link
    if filesystem == "without links":
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    if filesystem == "nfs that answers twice":
        monkeypatch.setattr(os, "link", lambda *names: [link(*names), link(*names)])
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("mine", "free"):
        (tmp_path / "new").write_bytes(b"new")
        with pytest.raises(FileExistsError) if name == "mine" else contextlib.nullcontext():
            linux.rename_if_absent(tmp_path / "new", tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"mine": b"mine", "free": b"new"}


def killed_before_it_is_published(rank: int, url: str, cache: str, arguments: dict) -> None:
    from rankload._fetch.partials.partial import Partial

    Partial.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    rankload.dist_fetch(url, cache, **arguments)


@pytest.mark.fault(60)
@pytest.mark.parametrize("state", ["another digest is expected", "empty"])
def test_killed_between_record_and_file(origin, cache, good_url, state, monkeypatch):
    """The record is the new file's already. The old one is still rankload's: it is replaced, and nothing stays."""
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "2")
    path = rankload.dist_fetch(good_url, cache)
    content, arguments = checkpoint_of({"w": GOOD}), {}
    if state == "empty":
        path.write_bytes(b"")
    else:
        content = checkpoint_of({"w": GOOD + 1})
        origin.add("models/victim.pth", content)
        arguments = {"sha256": hashlib.sha256(content).hexdigest()}
    [result] = run_ranks(killed_before_it_is_published, 1, env="none", args=(good_url, str(cache), arguments))
    assert result.exitcode == -signal.SIGKILL
    assert path.read_bytes() != content
    for _ in range(2):
        assert rankload.dist_fetch(good_url, cache, **arguments) == path
        assert path.read_bytes() == content
    assert origin.request_count() == 3
    assert [name for name in files_in(cache) if "partial" in name] == []


PARTIAL = "victim.pth.deadbeef-0-0-cafebabe.partial"


def planting_partial(evil: Origin, good_url: str, content: bytes) -> list[str]:
    """URLs of what a killed download of another URL would have left, with its journal, complete."""
    with urllib.request.urlopen(good_url) as answer:
        etag = answer.headers["ETag"]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    facts = {"size_bytes": len(content), "etag": etag, "last_modified": None, "sha256": None}
    lines = {"journal": 1, "boot": boot, "url_key": url_key(good_url), **facts}, [0, len(content)], {"synced": 1}
    journal = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return [evil.add(f"any/{PARTIAL}", content), evil.add(f"any/{PARTIAL}.journal", journal)]


@pytest.mark.fault(59)
@pytest.mark.parametrize("how", ["dist_fetch", "file_name", "hub"])
def test_origin_cannot_plant_the_beginning_of_another_file(evil, cache, good_url, how):
    cache.mkdir(exist_ok=True)
    for url in planting_partial(evil, good_url, checkpoint_of({"w": EVIL})):
        name = url.rpartition("/")[2]
        with pytest.raises(rankload.RankloadError, match="rankload's own files"):
            match how:
                case "dist_fetch":
                    rankload.dist_fetch(url, cache)
                case "file_name":
                    rankload.dist_fetch(evil.add("other", evil.url(name).encode()), cache, file_name=name)
                case "hub":
                    rankload.hub.download_url_to_file(url, str(cache / name), progress=False)
    assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache)["w"], GOOD)


@pytest.mark.fault(59)
@pytest.mark.timeout(30)
def test_file_of_another_url_that_has_become_empty_is_not_fetched_for_ever(evil, cache, good_url):
    """It is to be replaced, but not by another URL's, which could not be published however often it is fetched."""
    path = rankload.dist_fetch(good_url, cache)
    path.write_bytes(b"")
    url = evil.add(f"any/{path.name}", checkpoint_of({"w": EVIL}))
    for _ in range(2):
        assert torch.equal(rankload.dist_load_state_dict_from_url(url, cache)["w"], EVIL)
    assert evil.request_count() == 1
    assert path.read_bytes() == b""
    assert torch.equal(rankload.dist_load_state_dict_from_url(good_url, cache)["w"], GOOD)


@pytest.mark.parametrize("names", [["a.bin", "A.bin"], [INDEX], [INDEX.upper()]])
def test_parts_that_are_one_file_where_case_does_not_count_are_refused(evil, cache, names):
    """One would take the other's place, or the index'."""
    planting_index(evil, dict.fromkeys(names, checkpoint_of({"w": GOOD})), "other")
    url = evil.add(f"any/{INDEX}", json.dumps({"weight_map": dict(enumerate(names))}).encode())
    with pytest.raises(rankload.errors.NotACheckpointError, match="upper and lower case"):
        rankload.dist_load_state_dict_from_url(url, cache)
    assert evil.request_count() == 1


def test_names_that_are_cut_are_not_those_of_others(origin, evil, cache):
    """The record of a long name is called by its beginning and a digest: the name of another URL's file."""
    long = "v" * 216 + ".pth"
    url = origin.add(f"models/{long}", checkpoint_of({"w": GOOD}))
    rankload.dist_fetch(url, cache)
    record = Entry(cache / long).record_path
    before = record.read_bytes()
    rankload.dist_fetch(evil.add(f"any/{record.name.removesuffix('.json')}", checkpoint_of({"w": EVIL})), cache)
    assert record.read_bytes() == before
    assert torch.equal(rankload.dist_load_state_dict_from_url(url, cache)["w"], GOOD)
    assert origin.request_count() == 1


def test_index_with_the_longest_name(origin, cache):
    url = planting_index(origin, {"w.bin": checkpoint_of({"0": GOOD})}, "x" * 244 + ".index.json")
    for _ in range(2):
        assert torch.equal(rankload.dist_load_state_dict_from_url(url, cache)["0"], GOOD)
    assert origin.request_count() == 2


@pytest.mark.parametrize("kind", ["user's file in the way", "index", "part"])
def test_file_that_a_mirror_has_sent_is_replaced_without_that_mirror(origin, evil, cache, kind):
    """In the folder of the first URL it has no other entry to go to."""
    good = checkpoint_of({"0": GOOD})
    mirror = planting_index(evil, {"w.bin": checkpoint_of({"0": EVIL})}, INDEX)
    if kind == "user's file in the way":
        mirror = evil.add("any/victim.pth", checkpoint_of({"0": EVIL}))
        cache.mkdir()
        (cache / "victim.pth").write_bytes(b"mine")
    elif kind == "part":
        origin.add(f"any/{INDEX}", json.dumps({"weight_map": {"0": "w.bin"}}).encode())
    url = mirror.replace(str(evil.port), str(origin.port))
    loaded = rankload.dist_load_state_dict_from_url([url, mirror], cache)
    assert torch.equal(loaded["0"], EVIL)
    origin.add("any/victim.pth", good)
    planting_index(origin, {"w.bin": good}, INDEX)
    for _ in range(2):
        assert torch.equal(rankload.dist_load_state_dict_from_url(url, cache)["0"], GOOD)


@pytest.mark.fault(70)
@pytest.mark.parametrize("field", ["url", "sha256"])
def test_record_cannot_forge_a_log_line(origin, cache, good_url, caplog, field):
    rankload.dist_fetch(good_url, cache)
    record = cache / ".rankload" / "victim.pth.json"
    forged = {field: "http://x/\x1b[2J\nCRITICAL forged"} | ({"url_key": "0"} if field == "url" else {})
    record.write_text(json.dumps({**json.loads(record.read_text()), **forged}))
    with caplog.at_level("WARNING", "rankload"):
        rankload.dist_load_state_dict_from_url(good_url, cache, verify="always")
    assert "keeping" in caplog.text and "\nCRITICAL" not in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "content",
    ["[" * 60_000, json.dumps({"url": f"hf://org/other@{'0' * 40}/model.safetensors"})],
    ids=["deep", "other"],
)
def test_what_another_user_says_of_a_repository(cache, content):
    """Where its weights are: not in another repository. What cannot be read says nothing."""
    repository = HubRepository("org/one", None, None)
    memory = OwnMemory(cache)
    memory.keep(repository, f"hf://org/one@{'0' * 40}/model.safetensors")
    assert memory.recall(repository)
    memory._path_for(repository).write_text(content)
    with pytest.raises(rankload.errors.OfflineError, match="no earlier call has asked"):
        rankload.dist_load_state_dict_from_url("hf://org/one", cache, offline=True)


def test_download_to_a_path_replaces_only_files(origin, good_url, tmp_path):
    """As root, ``/dev/null`` would be a file from then on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(rankload.CacheError, match="no regular file"):
        rankload.hub.download_url_to_file(good_url, str(pipe), progress=False)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o777, 0o1777, 0o2775])
def test_own_directories_let_in_whom_the_cache_lets_in(good_url, origin, cache, mode):
    """An umask of 0, as in many containers, lets in nobody else."""
    cache.mkdir()
    cache.chmod(mode)
    index = planting_index(origin, {"w.bin": checkpoint_of({"0": GOOD})}, INDEX)
    before = os.umask(0)
    try:
        rankload.dist_fetch(good_url, cache)
        folder = rankload.dist_fetch(index, cache).parent
    finally:
        os.umask(before)
    for one in (cache / ".rankload", folder, folder / ".rankload"):
        assert stat.S_IMODE(one.stat().st_mode) & 0o1022 == mode & 0o1022


# --- another user ----------------------------------------------------------------------------------------------------


def plant(rank: int, cache: str, content: bytes, record: dict | None) -> None:
    """As Bob, a member of the group: a file, and perhaps a record that vouches for it."""
    with acting_as(BOB, [GROUP], 0o000):
        path = Path(cache, "victim.pth")
        path.write_bytes(content)
        if record is not None:
            own = Path(cache, ".rankload")
            own.mkdir(exist_ok=True)
            own.chmod(0o1777)
            status = path.stat()
            facts = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
            (own / "victim.pth.json").write_text(json.dumps({**record, **facts}))


def load_as_alice(rank: int, url: str, cache: str, arguments: dict) -> list[float]:
    with acting_as(ALICE, [GROUP]):
        return rankload.dist_load_state_dict_from_url(url, cache, progress=False, **arguments)["w"].tolist()


@needs_root
@pytest.mark.fault(62)
@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o777])
@pytest.mark.parametrize("has_record", [False, True])
@pytest.mark.parametrize("verify", ["once", "always", "never"])
def test_digest_holds_whatever_another_user_has_left(origin, good_url, mode, has_record, verify):
    """Bob's file claims, by Bob's record, to have the digest that Alice gives."""
    good, bad = checkpoint_of({"w": GOOD}), checkpoint_of({"w": EVIL})
    digest = hashlib.sha256(good).hexdigest()
    record = {
        "url": good_url, "url_key": url_key(good_url), "etag": None, "sha256": digest, "vouched_by": "sha256",
        "source": "download",
    }  # fmt: skip
    with public_directory(mode, GROUP) as cache:
        run_ranks(plant, 1, env="none", args=(str(cache), bad, record if has_record else None))
        for _ in range(2):
            results = run_ranks(load_as_alice, 2, args=(good_url, str(cache), {"sha256": digest, "verify": verify}))
            assert {tuple(result.value) for result in results} == {(1.0, 1.0)}
    assert origin.request_count() == 1


@needs_root
@pytest.mark.fault(62)
@pytest.mark.parametrize("verify", ["once", "always", "never"])
def test_record_of_another_user_is_no_sidecar(origin, good_url, verify):
    """Bob's record says that a sidecar has vouched for Bob's file."""
    good, bad = checkpoint_of({"w": GOOD}), checkpoint_of({"w": EVIL})
    origin.add("models/victim.pth.sha256", hashlib.sha256(good).hexdigest().encode())
    record = {
        "url": good_url, "url_key": url_key(good_url), "etag": None, "sha256": hashlib.sha256(bad).hexdigest(),
        "vouched_by": "sidecar", "source": "download",
    }  # fmt: skip
    with public_directory(0o1777) as cache:
        run_ranks(plant, 1, env="none", args=(str(cache), bad, record))
        arguments = {"sidecar": True, "verify": verify}
        results = run_ranks(load_as_alice, 2, args=(good_url, str(cache), arguments))
        assert {tuple(result.value) for result in results} == {(1.0, 1.0)}


def load_while_bob_writes(rank: int, url: str, cache: str, arguments: dict, how: str) -> list[list[float]]:
    """Loads what Bob has published; then Bob writes into his file."""
    with acting_as(ALICE, [GROUP]):
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.empty(2))
        if how == "module":
            rankload.dist_load_into(module, url, cache, assign=True, progress=False, **arguments)
            found = module.w
        elif how == "hub":
            found = rankload.hub.load_state_dict_from_url(url, cache, progress=False)["w"]
        else:
            found = rankload.dist_load_state_dict_from_url(url, cache, progress=False, **arguments)["w"]
    before = found.tolist()
    path = Path(cache, "victim.pth")
    with path.open("r+b") as file:
        content = file.read()
        at = content.index(GOOD.numpy().tobytes())
        file.seek(at)
        file.write(EVIL.numpy().tobytes())
    return [before, found.tolist()]


def fetch_as_bob(rank: int, url: str, cache: str) -> None:
    with acting_as(BOB, [GROUP]):
        rankload.dist_fetch(url, cache, progress=False)


@needs_root
@pytest.mark.fault(62)
@pytest.mark.parametrize("how", ["state dict", "module", "hub"])
@pytest.mark.parametrize("has_digest", [True, False])
def test_owner_cannot_change_weights_that_are_loaded(origin, good_url, how, has_digest):
    digest = hashlib.sha256(checkpoint_of({"w": GOOD})).hexdigest()
    arguments = {"sha256": digest} if has_digest and how != "hub" else {}
    with public_directory(0o2775, GROUP) as cache:
        run_ranks(fetch_as_bob, 1, env="none", args=(good_url, str(cache)))
        [result] = run_ranks(load_while_bob_writes, 1, args=(good_url, str(cache), arguments, how))
        assert result.value == [[1.0, 1.0], [1.0, 1.0]]
    assert origin.request_count() == 1


def memory_of_foreign_load(rank: int, url: str, cache: str) -> tuple[int, int]:
    """Bytes of the file, and of this rank's mappings of the copy: those that ranks share are divided among them."""
    torch.distributed.init_process_group("gloo")
    content = rankload.dist_load_state_dict_from_url(url, cache, progress=False)
    total = sum(float(tensor.sum()) for tensor in content.values())
    assert total > 0
    torch.distributed.barrier()  # all have touched all of it
    pss, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            is_ours = "memfd:rankload" in line
        elif is_ours and line.startswith("Pss:"):
            pss += int(line.split()[1]) * 1024
    torch.distributed.barrier()  # and nobody has let go of it
    return Path(cache, "big.pth").stat().st_size, pss


@needs_root
def test_ranks_of_a_node_share_the_copy(origin, cache):
    """Root trusts no other user's files, either."""
    url = origin.add("big.pth", checkpoint_of({f"w{number}": torch.rand(1 << 20) for number in range(8)}))
    os.chown(rankload.dist_fetch(url, cache), BOB, -1)
    results = run_ranks(memory_of_foreign_load, 2, args=(url, str(cache)))
    size = results[0].value[0]
    assert all(0 < result.value[1] <= 0.7 * size for result in results), [result.value for result in results]
    assert origin.bytes_sent() < 1.1 * size


@needs_root
def test_message_names_the_owner(origin, good_url):
    """`cannot write` alone leaves the reader looking for the reason."""
    with public_directory(0o755) as cache:
        os.chown(cache, BOB, -1)
        [result] = run_ranks(error_as_alice, 1, env="none", args=(good_url, str(cache)))
    assert f"belongs to uid {BOB}" in result.value and "model_dir=" in result.value


def error_as_alice(rank: int, url: str, cache: str) -> str:
    with acting_as(ALICE):
        try:
            rankload.dist_fetch(url, cache, progress=False)
        except rankload.CacheError as error:
            return str(error)
    return ""


@needs_root
@pytest.mark.parametrize("name", [".rankload", "sub"])
def test_another_users_folder_is_refused_in_a_cache_of_ones_own(origin, good_url, name):
    with public_directory(0o755) as cache:
        os.chown(cache, ALICE, -1)
        (cache / name).mkdir()
        os.chown(cache / name, BOB, -1)
        file_name = f"{name}/victim.pth" if name == "sub" else None
        [result] = run_ranks(refusal_as_alice, 1, env="none", args=(good_url, str(cache), file_name))
        assert result.value == f"{cache}/{name} belongs to uid {BOB}: refused"
        assert list((cache / name).iterdir()) == []


def refusal_as_alice(rank: int, url: str, cache: str, file_name: str | None) -> str:
    with acting_as(ALICE):
        try:
            rankload.dist_fetch(url, cache, file_name=file_name, progress=False)
        except rankload.CacheError as error:
            return str(error).partition(";")[0]
    return ""


def fetch_in_bounded_memory(rank: int, url: str, cache: str) -> int:
    """Bytes of the file; as Alice, who could allocate 1 GiB more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    with acting_as(ALICE, [GROUP]):
        return rankload.dist_fetch(url, cache, progress=False).stat().st_size


@needs_root
@pytest.mark.fault(62)
def test_journal_of_another_user_is_not_read(good_url):
    """It may be as long as Bob likes."""
    with public_directory(0o2775, GROUP) as cache:
        partial = cache / "victim.pth.00000000-1-1-00000000.partial"
        journal = partial.with_name(f"{partial.name}.journal")
        for path in (partial, journal):
            path.touch()
            os.chown(path, BOB, GROUP)
        os.truncate(journal, 4 << 30)
        [result] = run_ranks(fetch_in_bounded_memory, 1, env="none", args=(good_url, str(cache)), timeout_seconds=40)
        assert result.value == len(checkpoint_of({"w": GOOD}))


@pytest.mark.fault(62)
@pytest.mark.parametrize("pid", [2**31, 2**63, 10**30])
@pytest.mark.parametrize("ending", ["", ".journal"])
def test_partial_file_of_a_process_that_cannot_be(good_url, cache, pid, ending):
    """Whoever may write to the directory sees in others' names how this machine is called there."""
    machine = own_path(Entry(cache / "victim.pth")).name.split(".")[2].partition("-")[0]
    cache.mkdir()
    (cache / f"victim.pth.{machine}-{pid}-1-deadbeef.partial{ending}").touch()
    assert rankload.dist_fetch(good_url, cache).read_bytes() == checkpoint_of({"w": GOOD})
    assert files_in(cache) == [".rankload/victim.pth.json", "victim.pth"]


# --- hash prefixes ---------------------------------------------------------------------------------------------------


def test_short_hash_prefix_is_an_argument_error_unless_told_otherwise(origin, cache, caplog, monkeypatch):
    content = checkpoint_of({"w": GOOD})
    prefix = hashlib.sha256(content).hexdigest()[:4]
    url = origin.add(f"model-{prefix}.pth", content)
    with pytest.raises(rankload.ArgumentError, match="RANKLOAD_HASH_PREFIX_DIGITS=4"):
        rankload.dist_load_state_dict_from_url(url, cache, check_hash=True)
    assert origin.request_count() == 0
    with caplog.at_level("WARNING", "rankload"):
        rankload.hub.load_state_dict_from_url(url, str(cache / "hub"), check_hash=True, progress=False)
        assert "a hash prefix of 4 digits proves little" in caplog.text
    monkeypatch.setenv("RANKLOAD_HASH_PREFIX_DIGITS", "4")
    rankload.dist_load_state_dict_from_url(url, cache, check_hash=True)


def test_hash_prefix_does_not_pass_on_what_another_url_has_left(origin, evil, cache, monkeypatch):
    """Whoever forges the prefix knows how the right file goes on."""
    monkeypatch.setenv("RANKLOAD_HASH_PREFIX_DIGITS", "2")
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "1024")
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    good = os.urandom(8192)
    prefix = hashlib.sha256(good).hexdigest()[:2]
    candidates = (number.to_bytes(1024, "little") + good[1024:] for number in itertools.count())
    bad = next(one for one in candidates if hashlib.sha256(one).hexdigest().startswith(prefix))
    name = f"model-{prefix}.bin"
    evil_url = evil.add(name, bad, Reply(), Reply(status=403))
    with pytest.raises(rankload.errors.HTTPStatusError):
        rankload.dist_fetch(evil_url, cache, check_hash=True)
    assert any(found.endswith(".partial") for found in files_in(cache))
    found = rankload.dist_fetch(origin.add(name, good), cache, check_hash=True).read_bytes()
    assert found == good


def test_separate_entry_is_made_once(origin, cache, good_url):
    """Warm calls find it, and hash nothing."""
    cache.mkdir()
    (cache / "victim.pth").write_bytes(b"mine")
    separate = Entry(cache / "victim.pth").separate(Url.parse(good_url)).path
    for _ in range(3):
        rankload.dist_load_state_dict_from_url(good_url, cache)
    assert separate.exists() and origin.request_count() == 1


def load_while_bob_swaps(rank: int, url: str, cache: str, arguments: dict, how: str, planted: str) -> list[float] | str:
    """Bob, who may rename in the directory, puts another file there once this rank has looked at Alice's."""
    from rankload._load.node import held

    def look_then_swap(path: Path) -> bool:
        result = looked(path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(planted, Path(cache, "victim.pth"))
        return result

    looked, held.others_may_replace = held.others_may_replace, look_then_swap
    with acting_as(ALICE, [GROUP]):
        if how == "module":
            module = torch.nn.Module()
            module.w = torch.nn.Parameter(torch.empty(2))
            rankload.dist_load_into(module, url, cache, progress=False, **arguments)
            return module.w.tolist()
        return rankload.dist_load_state_dict_from_url(url, cache, progress=False, **arguments)["w"].tolist()


def fetch_as_alice(rank: int, url: str, cache: str) -> None:
    with acting_as(ALICE, [GROUP]):
        rankload.dist_fetch(url, cache, progress=False)


@needs_root
@pytest.mark.fault(62)
@pytest.mark.parametrize("how", ["state dict", "module"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_file_that_is_swapped_after_the_look_is_not_loaded(origin, good_url, how, kind):
    good, bad = checkpoint_of({"w": GOOD}), checkpoint_of({"w": EVIL})
    arguments = {"sha256": hashlib.sha256(good).hexdigest()}
    with public_directory(0o2775, GROUP) as cache:
        run_ranks(fetch_as_alice, 1, env="none", args=(good_url, str(cache)))
        planted = cache / "planted"
        if kind == "file":
            planted.write_bytes(bad)
        else:
            os.mkfifo(planted)
        os.chown(planted, BOB, GROUP)
        args = (good_url, str(cache), arguments, how, str(planted))
        [result] = run_ranks(load_while_bob_swaps, 1, args=args, timeout_seconds=40)
        assert result.value == [1.0, 1.0]
        assert not planted.exists()


def error_with_pipe(rank: int, url: str, cache: str) -> str:
    """Bob's pipe takes the file's place between the fetch and the look."""
    from rankload._fetch import fetch_once as once

    def fetch_then_swap(*args, **kwargs):
        file = fetched(*args, **kwargs)
        with contextlib.suppress(FileNotFoundError):
            os.replace(Path(cache, "planted"), file.path)
        return file

    fetched, once.fetch = once.fetch, fetch_then_swap
    with acting_as(ALICE, [GROUP]):
        try:
            rankload.dist_load_state_dict_from_url(url, cache, progress=False)
        except rankload.CacheError as error:
            return str(error)
    return ""


@needs_root
@pytest.mark.fault(62)
def test_pipe_in_the_place_of_a_fetched_file_is_an_error(origin, good_url, monkeypatch):
    """Opening it would wait for its writer, forever."""
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "1")
    with public_directory(0o2775, GROUP) as cache:
        os.mkfifo(cache / "planted")
        os.chown(cache / "planted", BOB, GROUP)
        results = run_ranks(error_with_pipe, 2, args=(good_url, str(cache)), timeout_seconds=40)
    assert all("victim.pth" in result.value for result in results), [result.value for result in results]


def fetch_with_pipe_for_probe(rank: int, url: str, cache: Path) -> bytes:
    """Bob sees the probe file's name, and puts a pipe there before another node has looked for it."""
    from rankload._fetch import cache_domain

    become_node(rank, cache.parent)

    def leave_then_swap(*args):
        name = left(*args)
        (cache / name).unlink()
        os.mkfifo(cache / name)
        return name

    left, cache_domain._leave_probe_file = cache_domain._leave_probe_file, leave_then_swap
    return rankload.dist_fetch(url, cache, progress=False).read_bytes()


@pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))
@pytest.mark.fault(62)
def test_pipe_in_the_place_of_a_probe_file_holds_no_node(good_url, cache):
    results = run_ranks(fetch_with_pipe_for_probe, 2, nodes=2, args=(good_url, cache), timeout_seconds=30)
    assert {result.value for result in results} == {checkpoint_of({"w": GOOD})}
    assert left_in(cache) == []


@needs_root
@pytest.mark.fault(62)
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_file_that_others_may_write_to_is_copied(origin, good_url, mode):
    """Left there by torch.hub, under an umask that lets the group write."""
    content = checkpoint_of({"w": GOOD})
    with public_directory(0o2775, GROUP) as cache:
        path = cache / "victim.pth"
        path.write_bytes(content)
        os.chown(path, ALICE, GROUP)
        path.chmod(mode)
        arguments = {"sha256": hashlib.sha256(content).hexdigest()}
        [result] = run_ranks(load_while_bob_writes, 1, args=(good_url, str(cache), arguments, "state dict"))
        assert result.value == [[1.0, 1.0], [1.0, 1.0]]


#: The owner and Bob may write, others may read: tag, permissions and id of each entry (acl(5), <linux/posix_acl.h>).
LETS_BOB_IN = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHi", *entry) for entry in [(1, 6, -1), (2, 6, BOB), (4, 4, -1), (16, 6, -1), (32, 4, -1)]
)


@needs_root
@pytest.mark.fault(62)
def test_file_that_an_access_list_lets_another_user_write_to_is_hashed_as_it_is_loaded(origin, good_url, monkeypatch):
    """Its mode shows only that somebody beside the owner may write, and the owner's group is the owner's alone."""
    content = checkpoint_of({"w": GOOD})
    with public_directory() as cache:
        path = cache / "victim.pth"
        path.write_bytes(content)
        try:
            os.setxattr(path, "system.posix_acl_access", LETS_BOB_IN)
        except OSError:
            pytest.skip("this filesystem has no access control lists")

        def hold_then_write(*args):
            found = hold(*args)
            with acting_as(BOB), path.open("r+b") as file:
                file.write(content.replace(GOOD.numpy().tobytes(), EVIL.numpy().tobytes()))
            return found

        hold = node_copy.hold
        monkeypatch.setattr(node_copy, "hold", hold_then_write)
        with pytest.raises(rankload.errors.DigestMismatchError, match="was changed after it was verified"):
            rankload.dist_load_state_dict_from_url(good_url, cache, sha256=hashlib.sha256(content).hexdigest())
