"""What is said about arguments that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from rankload._errors import ArgumentError
from rankload._fetch.request import default_directory, make_request


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host:port/x.pth?sig=hunter2",
        "https://user:a/hunter2@host/x.pth",
        "https://user:a?hunter2@host/x.pth",
        "https://user:hunter2@[host/x.pth",
        ["https://host/x.pth?sig=hunter2", ""],
        "ftp://user:hunter2@host/x.pth?sig=hunter2",
    ],
)
def test_an_error_about_a_url_shows_no_password_and_no_query(url: str | list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        make_request(
            url,
            default_directory(),
            check_hash=False,
            file_name=None,
            progress=False,
            sha256=None,
            headers=None,
            scope="auto",
            verify="once",
            offline=False,
            must_be_checkpoint=True,
        )
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": 5}, "url: expected a URL or a sequence of mirrors, got int"),
        ({"url": ["https://host/x.pth", None]}, "url: expected a URL or a sequence of mirrors, got NoneType"),
        ({"headers": "Authorization: Bearer hunter2"}, "headers: expected a mapping of names to values, got str"),
    ],
)
def test_arguments_of_other_types(arguments: Any, text: str) -> None:
    given: Any = {"url": "https://host/x.pth", "headers": None, **arguments}
    with pytest.raises(ArgumentError, match=text):
        make_request(
            given["url"],
            default_directory(),
            check_hash=False,
            file_name=None,
            progress=False,
            sha256=None,
            headers=given["headers"],
            scope="auto",
            verify="once",
            offline=False,
            must_be_checkpoint=True,
        )
