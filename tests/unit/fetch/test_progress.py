"""Lines about a download, by a clock that the test sets, and the bar of a resumed one."""

from __future__ import annotations

import logging

import pytest

from rankload._fetch.progress import ProgressLines, open_progress
from rankload._fetch.progress_bar import ProgressBar

GB = 10**9
URL = "https://host/model.pth"


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def written() -> list[str]:
    return []


def lines_of(clock: Clock, written: list[str], initial_bytes: int = 0) -> ProgressLines:
    return ProgressLines("model.pth", URL, initial_bytes, 30, clock=clock, write=written.append)


def test_a_line_at_the_start_one_per_interval_and_one_at_the_end(clock, written):
    with lines_of(clock, written) as lines:
        for _ in range(19):
            clock.seconds += 5
            lines.show(int((clock.seconds - 100) * GB / 10), 10 * GB)
        clock.seconds = 200
        lines.show(10 * GB, 10 * GB)
    assert written == [
        f"downloading {URL}",
        "model.pth: 3.00GB of 10.0GB (30%), 100MB/s, 01:10 left",
        "model.pth: 6.00GB of 10.0GB (60%), 100MB/s, 00:40 left",
        "model.pth: 9.00GB of 10.0GB (90%), 100MB/s, 00:10 left",
        "model.pth: 10.0GB in 100.0 s, 100MB/s",
    ]


def test_what_an_earlier_download_left_does_not_count_for_the_rate(clock, written):
    with lines_of(clock, written, 8 * GB) as lines:
        clock.seconds += 50
        lines.show(9 * GB, 10 * GB)
    assert written == [
        f"downloading {URL} (8.00GB are here already)",
        "model.pth: 9.00GB of 10.0GB (90%), 20.0MB/s, 00:50 left",
        "model.pth: 9.00GB in 50.0 s, 20.0MB/s",
    ]


def test_a_download_that_starts_over_counts_from_there(clock, written):
    with lines_of(clock, written, 8 * GB) as lines:
        clock.seconds += 20
        lines.show(0, 10 * GB)
        clock.seconds += 20
        lines.show(2 * GB, None)
    assert written[1:] == ["model.pth: 2.00GB, 100MB/s", "model.pth: 2.00GB in 20.0 s, 100MB/s"]


def test_a_download_that_stands_still_says_so(clock, written):
    with lines_of(clock, written, GB) as lines:
        clock.seconds += 30
        lines.show(GB, 10 * GB)
    assert written[1] == "model.pth: 1.00GB of 10.0GB (10%), 0.00B/s"


def test_a_failed_download_has_no_last_line(clock, written):
    with pytest.raises(ConnectionError), lines_of(clock, written) as lines:
        clock.seconds += 1
        lines.show(0, None)
        raise ConnectionError
    assert written == [f"downloading {URL}"]


def test_a_download_of_less_than_a_second_has_one_line(clock, written):
    with lines_of(clock, written) as lines:
        clock.seconds += 0.5
        lines.show(GB, GB)
    assert written == ["model.pth: 1.00GB in 0.5 s, 2.00GB/s"]


def test_lines_go_to_the_log_where_it_shows_them(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="rankload"), open_progress("x.pth", URL, 0, 30, is_wanted=True):
        pass
    assert caplog.messages[0].startswith("x.pth: 0.00B in ")
    assert capsys.readouterr().err == ""


def test_the_bar_of_a_resumed_download_knows_where_it_began(capsys):
    with ProgressBar("x.pth", 8 * GB) as bar:
        bar.show(9 * GB, 10 * GB)
        assert (bar.format_dict["n"], bar.format_dict["initial"]) == (9 * GB, 8 * GB)
        bar.show(GB, 10 * GB)  # it has started over
        assert (bar.format_dict["n"], bar.format_dict["initial"]) == (GB, 0)
