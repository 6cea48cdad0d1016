"""A download that died leaves what it has to the next one: journals, owners, mirrors."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

import rankload
from harness.fetch_calls import fetch, files_in, left_in, ranges_asked, whole_log
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.replies import Reply

CHUNK = 256 << 10
RECORD = ".rankload/file.bin.json"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # one answer to the first request would be all there is to see


@pytest.fixture
def sha256(big_content):
    return hashlib.sha256(big_content).hexdigest()


@pytest.fixture
def broken_off(origin, cache, big_content, monkeypatch):
    """The URL of a file of which a failed call has left the first ranges."""
    return break_off(origin, cache, big_content, monkeypatch)


def break_off(origin, cache, content, monkeypatch, **arguments):
    with monkeypatch.context() as patch:
        patch.setenv("RANKLOAD_STREAMS", "1")
        patch.setenv("RANKLOAD_RETRIES", "0")
        url = origin.add("file.bin", content, *[Reply()] * 4, Reply(status=503))
        with pytest.raises(rankload.errors.HTTPStatusError):
            rankload.dist_fetch(url, cache, **arguments)
    origin.add("file.bin", content)
    assert left_bytes(cache) > 3 * CHUNK
    return url


def journal_in(cache):
    [path] = cache.glob("*.partial.journal")
    return path


def partial_in(cache):
    [path] = cache.glob("*.partial")
    return path


def left_bytes(cache):
    lines = [json.loads(line) for line in journal_in(cache).read_text().splitlines()]
    return sum(line[1] - line[0] for line in lines if isinstance(line, list))


def fetched_anew(origin, url, cache, content, **arguments):
    """Fetches, checks, and returns how many bytes of the file this took."""
    before = sum(request.body_bytes_sent for request in origin.requests() if request.status in (200, 206))
    path = rankload.dist_fetch(url, cache, **arguments)
    assert path.read_bytes() == content
    assert left_in(cache) == [] and not list(cache.glob("*.journal"))
    return sum(request.body_bytes_sent for request in origin.requests() if request.status in (200, 206)) - before


@pytest.mark.fault(1, 37)
def test_job_that_was_killed(origin, cache, big_content, monkeypatch):
    """With several streams at work. What is lost is a chunk a stream, and what was on its way."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "4")
    content = big_content + big_content[::-1]
    url = origin.add("file.bin", content, bytes_per_second=4e6)
    with start_ranks(fetch, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_sent("file.bin", int(0.7 * len(content)))
        group.kill(0)
        group.wait_for_end(0)
    origin.wait_until_idle()
    assert origin.peak_concurrency("file.bin") == 4
    origin.add("file.bin", content)
    [result] = run_ranks(fetch, 1, env="none", args=(url, cache))
    assert "resuming" in result.stderr
    assert (cache / "file.bin").read_bytes() == content
    second_run = [request for request in origin.requests() if request.started_at > result.started_at]
    assert sum(request.body_bytes_sent for request in second_run) <= 0.4 * len(content) + 4 * CHUNK
    assert files_in(cache) == [RECORD, "file.bin"]


def fetch_noting_often(rank, url, cache):
    """Fetches; what comes is noted several times a second, not every few seconds."""
    from rankload._fetch.transfer import stream

    stream._NOTE_SECONDS = 0.1
    return fetch(rank, url, cache)


@pytest.mark.fault(1, 37)
def test_slow_job_that_was_killed_within_its_first_chunk(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(4 << 20))
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("file.bin", big_content, bytes_per_second=4e6)
    with start_ranks(fetch_noting_often, 1, env="none", args=(url, cache)) as group:
        wait_until(lambda: list(cache.glob("*.journal")) and left_bytes(cache) > 5e5, 30, "some is noted")
        group.kill(0)
        group.wait_for_end(0)
    there = left_bytes(cache)
    assert there < 4 << 20
    origin.wait_until_idle()
    origin.add("file.bin", big_content)
    assert fetched_anew(origin, url, cache, big_content) <= len(big_content) - there


@pytest.mark.fault(1)
def test_failed_call_and_a_new_one_in_the_same_process(origin, cache, big_content, broken_off, caplog):
    there = left_bytes(cache)
    assert partial_in(cache).stat().st_blocks > 0
    with whole_log(caplog):
        assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content) - there
    assert f"it has {there} bytes" in caplog.text
    assert rankload.dist_fetch(broken_off, cache).stat().st_size == len(big_content)


@pytest.mark.parametrize("junk", [b"", b"garbage\n", b"\x00" * 100, b"[]\n", b'{"journal": 99}\n', b'{"journal": 1}\n'])
def test_unusable_journal_makes_it_start_over(origin, cache, big_content, broken_off, junk):
    journal_in(cache).write_bytes(junk)
    assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content)


def test_missing_journal_makes_it_start_over(origin, cache, big_content, broken_off):
    journal_in(cache).unlink()
    assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content)


@pytest.mark.parametrize("cut", [1, 5])
def test_last_line_of_the_journal_that_was_cut_off_is_ignored(origin, cache, big_content, broken_off, cut):
    *kept, last = journal_in(cache).read_bytes().splitlines(keepends=True)
    begin, end = json.loads(last)
    there = left_bytes(cache)
    journal_in(cache).write_bytes(b"".join(kept) + last[:-cut])
    assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content) - there + (end - begin)


def test_after_a_reboot_only_what_was_synced_counts(origin, cache, big_content, broken_off):
    head, *ranges = [json.loads(line) for line in journal_in(cache).read_text().splitlines()]
    lines = [{**head, "boot": "another"}, *ranges[:2], {"synced": 2}, *ranges[2:]]
    journal_in(cache).write_text("".join(json.dumps(line) + "\n" for line in lines))
    synced_bytes = sum(end - begin for begin, end in ranges[:2])
    assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content) - synced_bytes


def test_after_a_reboot_nothing_counts_that_was_not_synced(origin, cache, big_content, broken_off):
    text = journal_in(cache).read_text()
    head = json.loads(text.splitlines()[0])
    journal_in(cache).write_text(text.replace(head["boot"], "another"))
    assert fetched_anew(origin, broken_off, cache, big_content) == len(big_content)


@pytest.mark.fault(6)
def test_journal_of_another_version(origin, cache, big_content, broken_off):
    other = big_content[::-1]
    origin.add("file.bin", other)
    assert fetched_anew(origin, broken_off, cache, other) >= len(other)


def test_journal_of_another_digest(origin, cache, big_content, monkeypatch, sha256):
    """What was fetched for another digest is not gone on with, be the URL the same."""
    url = break_off(origin, cache, big_content, monkeypatch, sha256="0" * 64)
    assert fetched_anew(origin, url, cache, big_content, sha256=sha256) == len(big_content)


def test_bytes_of_one_url_serve_another_with_the_same_digest(origin, cache, big_content, monkeypatch, sha256):
    break_off(origin, cache, big_content, monkeypatch, sha256=sha256)
    there = left_bytes(cache)
    url = origin.add("elsewhere/file.bin", big_content, etag='"another server"')
    assert fetched_anew(origin, url, cache, big_content, sha256=sha256) == len(big_content) - there


def test_fresh_signature_goes_on_with_what_the_old_one_has_fetched(origin, cache, big_content, broken_off):
    there = left_bytes(cache)
    signed = f"{broken_off}?X-Amz-Signature=fresh&X-Amz-Date=2"
    assert fetched_anew(origin, signed, cache, big_content) == len(big_content) - there


def test_bytes_of_one_url_do_not_serve_another_without_a_digest(origin, cache, big_content, broken_off):
    url = origin.add("elsewhere/file.bin", big_content)
    assert fetched_anew(origin, url, cache, big_content) == len(big_content)


@pytest.mark.fault(7)
def test_nothing_is_asked_for_when_everything_is_there(origin, cache, big_content, broken_off):
    partial_in(cache).write_bytes(big_content)
    with journal_in(cache).open("a") as journal:
        journal.write(json.dumps([0, len(big_content)]) + "\n")
    count = origin.request_count()
    assert fetched_anew(origin, broken_off, cache, big_content) == 0
    assert origin.request_count() == count


@pytest.mark.fault(7, 18)
def test_everything_is_there_but_damaged(origin, cache, big_content, monkeypatch, sha256):
    url = break_off(origin, cache, big_content, monkeypatch, sha256=sha256)
    partial_in(cache).write_bytes(b"X" + big_content[1:])
    with journal_in(cache).open("a") as journal:
        journal.write(json.dumps([0, len(big_content)]) + "\n")
    assert fetched_anew(origin, url, cache, big_content, sha256=sha256) == len(big_content)
    assert (cache / ".rankload/quarantine/file.bin").read_bytes()[:1] == b"X"


@pytest.mark.fault(18)
def test_digest_of_a_resumed_file_is_verified(origin, cache, big_content, monkeypatch, sha256, caplog):
    """A bit that flipped on disk: what came is put aside, and the file is fetched once more, in one piece."""
    url = break_off(origin, cache, big_content, monkeypatch, sha256=sha256)
    there = left_bytes(cache)
    with partial_in(cache).open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"damaged")
    with whole_log(caplog):
        taken = fetched_anew(origin, url, cache, big_content, sha256=sha256)
    assert taken == len(big_content) - there + len(big_content)
    assert ranges_asked(origin)[-1] is None
    assert "invalid hash value" in caplog.text and "fetching it once more" in caplog.text
    assert files_in(cache) == [
        RECORD, ".rankload/quarantine/file.bin", ".rankload/quarantine/file.bin.json", "file.bin",
    ]  # fmt: skip


def test_partial_of_a_living_process_is_left_alone(origin, cache, big_content, monkeypatch):
    """A job that is suspended loses its lease, not its bytes; when it goes on it publishes them."""
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "0.9")
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("file.bin", big_content, Reply(), Reply(hold_at=CHUNK // 2), Reply())
    with start_ranks(fetch, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        group.stop(0)
        theirs = partial_in(cache)
        [other] = run_ranks(fetch, 1, env="none", args=(url, cache))
        assert other.value == str(cache / "file.bin")
        assert theirs.exists() and "resuming" not in other.stderr
        origin.release("file.bin")
        group.cont(0)
        assert group.wait()[0].value == str(cache / "file.bin")
    assert (cache / "file.bin").read_bytes() == big_content
    wait_until(lambda: files_in(cache) == [RECORD, "file.bin"], 5, "nothing else is left")


def test_mirror_goes_on_where_the_first_one_broke_off(origin, cache, big_content, monkeypatch, sha256, caplog):
    """With a digest: whose bytes they are does not matter."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    first = origin.add("file.bin", big_content, Reply(), Reply(), Reply(status=404))
    second = origin.add("mirror/file.bin", big_content, etag='"another server"')
    with whole_log(caplog):
        assert fetched_anew(origin, [first, second], cache, big_content, sha256=sha256) == len(big_content)
    assert "trying the next mirror" in caplog.text
    served = origin.requests("mirror/file.bin")
    assert served and all(request.headers["range"] != f"bytes=0-{CHUNK - 1}" for request in served)


def test_mirror_starts_over_without_a_digest(origin, cache, big_content, monkeypatch):
    """Nothing would tell that it has another version."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    first = origin.add("file.bin", big_content, Reply(), Reply(), Reply(status=404))
    other = big_content[::-1]
    second = origin.add("mirror/file.bin", other)
    rankload.dist_fetch([first, second], cache)
    assert (cache / "file.bin").read_bytes() == other
    assert sum(request.body_bytes_sent for request in origin.requests("mirror/file.bin")) == len(other)
    assert ranges_asked(origin, "mirror/file.bin")[0] == f"bytes=0-{CHUNK - 1}"


def test_mirror_with_another_file_is_found_out(origin, cache, big_content, monkeypatch, sha256):
    """The same length, and a digest that does not hold: the first URL is asked again for all of it."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    first = origin.add("file.bin", big_content, Reply(), Reply(), Reply(status=404), Reply())
    second = origin.add("mirror/file.bin", big_content[::-1])
    path = rankload.dist_fetch([first, second], cache, sha256=sha256)
    assert path.read_bytes() == big_content
    assert ranges_asked(origin, "file.bin")[-1] is None


def test_first_mirror_that_breaks_off_another_file_does_not_spoil_the_next_ones(
    origin, cache, big_content, monkeypatch, sha256
):
    """It fails when it is asked again, too: then the whole file of the next one counts."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    first = origin.add("file.bin", big_content[::-1], Reply(), Reply(), Reply(status=404))
    second = origin.add("mirror/file.bin", big_content)
    path = rankload.dist_fetch([first, second], cache, sha256=sha256)
    assert path.read_bytes() == big_content
    assert ranges_asked(origin, "mirror/file.bin")[-1] is None


@pytest.fixture
def digest_header(sha256):
    return {"Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"}


def test_mirror_goes_on_under_the_first_ones_digest(origin, cache, big_content, monkeypatch, digest_header):
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    told = Reply(headers=digest_header)
    first = origin.add("file.bin", big_content, told, told, Reply(status=404))
    second = origin.add("mirror/file.bin", big_content, etag='"another server"')
    assert fetched_anew(origin, [first, second], cache, big_content) == len(big_content)
    assert json.loads((cache / RECORD).read_text())["vouched_by"] == "repr-digest"


def test_mirror_with_another_file_is_found_out_by_the_first_ones_digest(
    origin, cache, big_content, monkeypatch, digest_header
):
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    told = Reply(headers=digest_header)
    first = origin.add("file.bin", big_content, told, told, Reply(status=404), told)
    second = origin.add("mirror/file.bin", big_content[::-1])
    assert rankload.dist_fetch([first, second], cache).read_bytes() == big_content


def test_bytes_of_two_mirrors_are_not_left_without_their_digest(origin, cache, big_content, monkeypatch, digest_header):
    """No later download would know what they are to be held to."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    told = Reply(headers=digest_header)
    first = origin.add("file.bin", big_content, told, told, Reply(status=404))
    second = origin.add("mirror/file.bin", big_content[::-1], Reply(), Reply(), Reply(status=404))
    with pytest.raises(rankload.errors.HTTPStatusError):
        rankload.dist_fetch([first, second], cache)
    assert origin.request_count("mirror/file.bin") == 3
    assert files_in(cache) == []
