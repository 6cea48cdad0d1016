"""The bar on a terminal, lines elsewhere: of the rank that downloads, and of no other."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

import rankload
from harness.fetch_calls import fetch
from harness.ranks import run_ranks, wait_until
from harness.replies import Reply
from harness.scripts import start_program


def on_a_terminal(code: str) -> tuple[str, str]:
    """Runs Python code with a terminal as its stderr; returns what it wrote to stdout and to the terminal."""
    ours, theirs = open_terminal()
    written = bytearray()

    def collect() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # EIO: the last one who had it open is gone
                return
            written.extend(piece)

    reader = threading.Thread(target=collect)
    try:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            reader.start()
            try:
                stdout, _ = process.communicate(timeout=60)
            finally:
                process.kill()
        reader.join(10)
    finally:
        os.close(ours)
    assert process.returncode == 0, written.decode()
    return stdout.decode(), written.decode()


def open_terminal() -> tuple[int, int]:
    """A terminal of 24 lines of 80 columns: its own descriptor, and the one that programs write to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return ours, theirs


def fetching(url, cache, **arguments) -> str:
    return f"import rankload; rankload.dist_fetch({url!r}, {str(cache)!r}, **{arguments!r})"


def test_bar_on_a_terminal(origin, cache, big_content):
    stdout, shown = on_a_terminal(fetching(origin.add("file.bin", big_content), cache))
    assert stdout == ""
    assert "file.bin: 100%" in shown and "8.00M/8.00M" in shown


def test_no_bar_with_progress_false(origin, cache, big_content):
    assert on_a_terminal(fetching(origin.add("file.bin", big_content), cache, progress=False)) == ("", "")


def test_no_bar_when_cached(origin, cache, big_content):
    url = origin.add("file.bin", big_content)
    rankload.dist_fetch(url, cache)
    assert on_a_terminal(fetching(url, cache)) == ("", "")


def test_lines_instead_of_a_bar_without_a_terminal(origin, cache, big_content, capfd):
    url = origin.add("file.bin", big_content)
    rankload.dist_fetch(url, cache)
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert re.search(r"^rankload: file\.bin: 8\.39MB in \d+\.\d s, [\d.]+[MG]B/s\n\Z", stderr, re.MULTILINE), stderr


def test_no_lines_with_progress_false_or_when_cached(origin, cache, big_content, capfd):
    url = origin.add("file.bin", big_content)
    rankload.dist_fetch(url, cache, progress=False)
    rankload.dist_fetch(url, cache)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["call", "prefetch"])
def test_a_line_per_interval(origin, cache, big_content, how):
    url = f"{origin.add('file.bin', big_content, hold_at=1000)}?token=SECRET"
    command = {
        "call": [sys.executable, "-c", fetching(url, cache)],
        "prefetch": [sys.executable, "-m", "rankload", "prefetch", "--any-file", url, "--model-dir", cache],
    }[how]
    with start_program(command, env={"RANKLOAD_REPORT_SECONDS": "0.2"}) as program:
        wait_until(lambda: program.stderr.count(" of 8.39MB (0%), ") >= 2, 30, "two lines have come")
        origin.release("file.bin")
        lines = program.wait().check().stderr.splitlines()
    assert all(line.startswith("rankload: ") for line in lines)
    assert lines[0] == f"rankload: downloading {origin.url('file.bin')}?…" and " in " in lines[-1]


def test_log_lines_do_not_break_the_bar(origin, cache, big_content, monkeypatch):
    """The origin ends every connection once: warnings come while the bar is there."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("file.bin", big_content, *[Reply(truncate_at=100_000)] * 2, Reply())
    _, shown = on_a_terminal(fetching(url, cache))
    lines = [as_on_screen(line) for line in shown.split("\n")]
    [*warnings, bar] = [line for line in lines if line]
    assert warnings and all(line.startswith("http://") for line in warnings), lines
    assert "retrying" in "".join(warnings)
    assert bar.startswith("file.bin: 100%"), lines


def as_on_screen(line: str) -> str:
    """What one line of a terminal shows in the end: later text overwrites earlier after a carriage return."""
    screen = ""
    for text in line.split("\r"):
        screen = text + screen[len(text) :]
    return screen.rstrip()


def test_bar_only_on_the_rank_that_downloads(origin, cache, big_content):
    """Every rank has a terminal here, as under ``torchrun`` in a shell."""
    url = origin.add("file.bin", big_content)
    results = run_ranks(fetch_on_a_terminal, 3, args=(url, cache))
    assert ["100%" in result.value for result in results] == [True, False, False]


def fetch_on_a_terminal(rank, url, cache):
    ours, theirs = open_terminal()
    os.dup2(theirs, 2)
    fetch(rank, url, cache)
    os.set_blocking(ours, False)
    try:
        return os.read(ours, 65536).decode()
    except BlockingIOError:
        return ""
