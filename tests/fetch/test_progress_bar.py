"""The bar: on a terminal, on the rank that downloads, and nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import rankload
from harness.fetch_calls import fetch
from harness.ranks import run_ranks


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


def test_no_bar_without_a_terminal(origin, cache, big_content, capfd):
    rankload.dist_fetch(origin.add("file.bin", big_content), cache)
    assert capfd.readouterr() == ("", "")


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
