"""What is said about arguments that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rankload
import rankload.hub
from rankload._fetch.request import default_directory, make_request
from rankload._settings import Settings
from rankload.errors import ArgumentError


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host:port/x.pth?sig=hunter2",
        "https://user:a/hunter2@host/x.pth",
        "https://user:a?hunter2@host/x.pth",
        "https://user:hunter2@[host/x.pth",
        ["https://host/x.pth?sig=hunter2", ""],
        "ftp://user:hunter2@host/x.pth?sig=hunter2",
        "file://user:hunter2@host/x.pth",
        "https:/user:hunter2@host/x.pth",
        "https:user:hunter2@host/x.pth",
        "https:///user:hunter2@host/x.pth",
        "https://user:hunter2\\@host/x.pth",
        "https://user:hun ter2@host/x.pth".replace("hun ter2", "x hunter2"),
        "https://user:a#hunter2@host/x.pth",
        "https://user:hunter2@host/x\n.pth",
        "s3:/key:hunter2@bucket/x.pth",
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
            max_bytes=None,
            refresh=False,
            settings=Settings(),
        )
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": 5}, "url: expected a URL or a sequence of mirrors, got int"),
        ({"url": ["https://host/x.pth", None]}, "url: expected a URL or a sequence of mirrors, got NoneType"),
        ({"headers": "Authorization: Bearer hunter2"}, "headers: expected a mapping of names to values, got str"),
        (
            {"headers": {"Authorization: Bearer hunter2": ""}},
            r"headers\['Authorization…'\]: expected the name of a header",
        ),
        ({"headers": {"X Token": "hunter2"}}, r"headers\['X…'\]: expected the name of a header"),
        ({"headers": {":path": "hunter2"}}, r"headers\[':'\]: expected the name of a header"),
        ({"headers": {"": "hunter2"}}, r"headers\[''\]: expected the name of a header"),
        ({"sha256": b"0" * 64}, "sha256=.*: expected 64 hex digits"),
        ({"url": "file:///a%00b.pth"}, "zero byte"),
        ({"model_dir": "a\0b"}, "zero byte"),
        ({"model_dir": "~nobody-of-this-name/cache"}, "~nobody-of-this-name/cache: "),
    ],
)
def test_arguments_that_are_none(arguments: Any, text: str) -> None:
    given: Any = {"url": "https://host/x.pth", "headers": None, "sha256": None, "model_dir": "cache", **arguments}
    with pytest.raises(ArgumentError, match=text) as caught:
        make_request(
            given["url"],
            given["model_dir"],
            check_hash=False,
            file_name=None,
            progress=False,
            sha256=given["sha256"],
            headers=given["headers"],
            scope="auto",
            verify="once",
            offline=False,
            must_be_checkpoint=True,
            max_bytes=None,
            refresh=False,
            settings=Settings(),
        )
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "../a", "/a", ".rankload"])
def test_a_file_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ArgumentError, match="expected a relative file name"):
        make_request("https://host/x.pth", "cache", Settings(), file_name=name)


def test_names_that_are_too_long_for_any_file(tmp_path: Path) -> None:
    name = "x" * 300
    for call in (rankload.open_checkpoint, rankload.dist_fetch, rankload.load):
        with pytest.raises(rankload.RankloadError, match=f"{name}.*File name too long"):
            call(name)
    with pytest.raises(rankload.CacheError, match="File name too long"):
        rankload.hub.download_url_to_file("http://127.0.0.1:9/x", str(tmp_path / name))
    with pytest.raises(rankload.ArgumentError, match="expected owner/name"):
        rankload.hub.load(f"owner/name:{name}", "model", trust_repo=True)
