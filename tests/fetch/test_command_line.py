"""``rankload prefetch``, as a shell calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rankload
from harness.origin import Origin
from harness.scripts import start_program
from harness.waiting import wait_until

TOKEN = "Bearer SECRET-TOKEN"


def prefetch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankload", "prefetch", "--quiet", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "300"}  # typer wraps what it says
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_prints_the_path_and_nothing_else(origin, cache, checkpoint):
    done = prefetch(origin.add("model.pth", checkpoint.path), "--model-dir", cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{cache / 'model.pth'}\n", "")
    assert (cache / "model.pth").read_bytes() == checkpoint.path.read_bytes()


def test_headers_from_a_file(origin, cache, checkpoint, tmp_path):
    url = origin.add("model.pth", checkpoint.path, required_headers={"Authorization": TOKEN, "X-Site": "a:b"})
    headers = tmp_path / "headers"
    headers.write_text(f"Authorization: {TOKEN}\n\nX-Site: a:b\n")
    done = prefetch(url, "--model-dir", cache, "--header", f"@{headers}")
    assert done.returncode == 0, done.stderr


def test_headers_from_a_file_that_is_not_there(cache, tmp_path):
    done = prefetch("https://host.invalid/model.pth", "--model-dir", cache, "--header", f"@{tmp_path}/headers")
    assert done.returncode == 2
    assert "cannot read" in done.stderr and "No such file" in done.stderr


def test_headers_from_a_file_that_is_no_text(cache, tmp_path):
    headers = tmp_path / "headers"
    headers.write_bytes(b"Authorization: \xff")
    done = prefetch("https://host.invalid/model.pth", "--model-dir", cache, "--header", f"@{headers}")
    assert done.returncode == 2
    assert "it is not a text file" in done.stderr and "Traceback" not in done.stderr


def test_header_without_a_value(cache):
    done = prefetch("https://host.invalid/model.pth", "--model-dir", cache, "--header", TOKEN)
    assert done.returncode == 2
    assert "expected 'Name: value'" in done.stderr and "SECRET" not in done.stderr


def test_error_is_one_line(origin, cache):
    done = prefetch(f"{origin.url('absent.pth')}?sig=SECRET", "--model-dir", cache)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("rankload: ") and "404" in line and "SECRET" not in line


def test_several_files_and_one_that_is_absent(origin, cache, checkpoint, other_checkpoint):
    """All that can be had are; a line for each that cannot, and the exit status says so."""
    urls = [origin.add("a.pth", checkpoint.path), origin.url("absent.pth"), origin.add("b.pth", other_checkpoint.path)]
    done = prefetch(*urls, "--model-dir", cache)
    assert done.returncode == 1
    assert done.stdout == f"{cache / 'a.pth'}\n{cache / 'b.pth'}\n"
    [line] = done.stderr.splitlines()
    assert line.startswith("rankload: ") and "404" in line and "absent.pth" in line


def test_header_is_not_for_several_servers(origin, cache, checkpoint):
    """A token for the one is none of the other's business."""
    with Origin() as other:
        urls = origin.add("a.pth", checkpoint.path), other.add("b.pth", checkpoint.path)
        done = prefetch(*urls, "--model-dir", cache, "--header", f"Authorization: {TOKEN}")
        assert done.returncode == 2 and "headers are for one server" in done.stderr and "SECRET" not in done.stderr
        assert origin.request_count() == other.request_count() == 0


@pytest.mark.fault(63)
def test_header_is_not_for_the_servers_of_several_names(origin, cache, tmp_path, monkeypatch):
    """Names in a table stand for URLs."""
    monkeypatch.chdir(tmp_path)
    with Origin() as elsewhere:
        urls = {name: origin.add(f"{name}.bin", b"file") for name in ("one", "three")}
        urls["two"] = elsewhere.add("two.bin", b"file")
        (tmp_path / "rankload.toml").write_text("".join(f"[{name}]\nurl = '{urls[name]}'\n" for name in urls))
        options = ("--model-dir", cache, "--any-file", "--header", f"Authorization: {TOKEN}")
        done = prefetch("one", "two", *options)
        assert done.returncode == 2 and "headers are for one server" in done.stderr and "SECRET" not in done.stderr
        assert origin.request_count() == elsewhere.request_count() == 0
        assert prefetch("one", "three", urls["one"], *options).returncode == 0
        assert {request.headers["authorization"] for request in origin.requests()} == {TOKEN}


def test_header_for_several_files_of_one_server(origin, cache, checkpoint):
    urls = [origin.add(name, checkpoint.path, required_headers={"Authorization": TOKEN}) for name in ("a.pth", "b.pth")]
    done = prefetch(*urls, "--model-dir", cache, "--header", f"Authorization: {TOKEN}")
    assert (done.returncode, done.stdout) == (0, f"{cache / 'a.pth'}\n{cache / 'b.pth'}\n")


def test_mirror(origin, cache, checkpoint):
    done = prefetch(origin.url("absent.pth"), "--mirror", origin.add("a.pth", checkpoint.path), "--model-dir", cache)
    assert (done.returncode, done.stdout) == (0, f"{cache / 'absent.pth'}\n")


def test_options_of_one_file_with_several(origin, cache):
    for option in (["--mirror", "https://host/c"], ["--file-name", "x"], ["--sha256", "0" * 64]):
        done = prefetch("https://host/a", "https://host/b", *option, "--model-dir", cache)
        assert done.returncode == 2 and "pass one URL" in done.stderr


def test_directory_from_the_environment(origin, cache, checkpoint, monkeypatch):
    monkeypatch.setenv("RANKLOAD_MODEL_DIR", str(cache))
    url = origin.add("a.pth", checkpoint.path)
    assert prefetch(url).stdout == f"{cache / 'a.pth'}\n"
    assert rankload.dist_fetch(url) == cache / "a.pth"
    assert origin.request_count() == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_several_downloads_that_are_interrupted_leave_nothing(origin, cache, signum):
    urls = [origin.add(f"{number}.bin", bytes(3_000_000), hold_at=100_000) for number in range(2)]
    command = [sys.executable, "-m", "rankload", "prefetch", "--any-file", "--model-dir", cache, *urls]
    with start_program(command) as program:
        wait_until(lambda: len(list(cache.glob("*.partial"))) == 2, 30, "both downloads have begun")
        os.kill(program.pid, signum)
        program.wait(20)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == []
