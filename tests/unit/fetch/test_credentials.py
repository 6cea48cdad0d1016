"""Which headers go to which host."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import Credentials, headers_of
from rankload._urls import Url, server_of

GIVEN = (("X-Api-Key", "secret"),)
GITHUB = {"GH_TOKEN": "gh"}
HUB = {"HF_TOKEN": "hf"}


def headers_for(url, origin_url, given, environ):
    """What is sent to the server of one URL when another was asked for."""
    return Credentials(origin_url, given, environ).headers_for(server_of(url))


def authorization(url, environ, given=()):
    return dict(headers_for(url, url, given, environ)).get("Authorization")


@pytest.mark.parametrize(
    ("url", "is_for"),
    [
        ("https://host.example/file", True),
        ("https://host.example/other", True),
        ("https://HOST.example:443/file", True),
        ("https://user@host.example/file", True),
        ("https://host.example:8443/file", False),
        ("http://host.example/file", False),
        ("https://sub.host.example/file", False),
        ("https://host.example.evil.example/file", False),
        ("https://host.example@evil.example/file", False),
        ("https://evil.example/https://host.example/file", False),
    ],
)
def test_headers_of_the_caller(url, is_for):
    assert headers_for(url, "https://host.example/file", GIVEN, {}) == (GIVEN if is_for else ())


@pytest.mark.parametrize(
    ("url", "environ", "token"),
    [
        ("https://github.com/a/b/releases/download/v1/c.pth", GITHUB, "gh"),
        ("https://github.com:443/c.pth", GITHUB, "gh"),
        ("https://GitHub.com/c.pth", GITHUB, "gh"),
        ("https://api.github.com/repos/a/b/releases/assets/1", GITHUB, "gh"),
        ("https://codeload.github.com/a", GITHUB, "gh"),
        ("https://raw.githubusercontent.com/a", GITHUB, "gh"),
        ("https://github.com/c.pth", {"GITHUB_TOKEN": "actions"}, "actions"),
        ("https://github.com/c.pth", {**GITHUB, "GITHUB_TOKEN": "actions"}, "gh"),
        ("https://github.com/c.pth", {"GH_TOKEN": " ", "GITHUB_TOKEN": "actions\n"}, "actions"),
        ("https://github.com/c.pth", {"GH_TOKEN": "with\nbreak"}, None),
        ("https://github.com/c.pth", {"GH_TOKEN": "\N{SNOWMAN}"}, None),
        ("https://github.com/c.pth", HUB, None),
        ("https://github.com/c.pth", {}, None),
        ("http://github.com/c.pth", GITHUB, None),
        ("https://github.com:8443/c.pth", GITHUB, None),
        ("https://objects.githubusercontent.com/c.pth", GITHUB, None),
        ("https://github.com.evil.example/c.pth", GITHUB, None),
        ("https://evilgithub.com/c.pth", GITHUB, None),
        ("https://huggingface.co/a/resolve/main/c.pth", HUB, "hf"),
        ("https://huggingface.co/c.pth", {"HUGGING_FACE_HUB_TOKEN": "old"}, "old"),
        ("https://huggingface.co/c.pth", GITHUB, None),
        ("http://huggingface.co/c.pth", HUB, None),
        ("https://cdn-lfs.huggingface.co/c.pth", HUB, None),
        ("https://cas-bridge.xethub.hf.co/c.pth", HUB, None),
        ("http://mirror.lan:8080/c.pth", {**HUB, "HF_ENDPOINT": "http://mirror.lan:8080"}, "hf"),
        ("http://mirror.lan:8080/c.pth", {**HUB, "HF_ENDPOINT": "http://mirror.lan:8080/base/"}, "hf"),
        ("http://mirror.lan:8081/c.pth", {**HUB, "HF_ENDPOINT": "http://mirror.lan:8080"}, None),
        ("http://mirror.lan:8080/c.pth", {**HUB, "HF_ENDPOINT": "https://mirror.lan:8080"}, None),
        ("https://huggingface.co/c.pth", {**HUB, "HF_ENDPOINT": "https://mirror.lan"}, "hf"),
        ("http://mirror.lan/c.pth", {**HUB, "HF_ENDPOINT": ""}, None),
        ("http://mirror.lan/c.pth", {**HUB, "HF_ENDPOINT": "nonsense"}, None),
        ("http://mirror.lan/c.pth", {**HUB, "HF_ENDPOINT": "http://[mirror.lan"}, None),
        ("https://huggingface.co/c.pth", {**HUB, "HF_ENDPOINT": "http://mirror.lan:port"}, "hf"),
        ("http://mirror.lan/c.pth", {**GITHUB, "HF_ENDPOINT": "http://mirror.lan"}, None),
    ],
)
def test_token(url, environ, token, tmp_path):
    environ = {"HF_HOME": str(tmp_path), **environ}
    assert authorization(url, environ) == (f"Bearer {token}" if token else None)


@pytest.mark.parametrize(
    ("url", "user"),
    [
        ("https://github.com@evil.example/c.pth", "github.com:"),
        ("https://user:password@github.com/c.pth", "user:password"),
        ("https://user:p%40ss@github.com/c.pth", "user:p@ss"),
    ],
)
def test_user_of_the_url_comes_before_a_token(url, user):
    assert authorization(url, GITHUB) == f"Basic {b64encode(user.encode()).decode()}"
    assert headers_for(url, "https://other.example/c.pth", (), {}) == ()


def test_netrc_is_for_the_callers_own_server(tmp_path, monkeypatch):
    """Not even its entry for another host is sent there, when only a redirect names that host."""
    (tmp_path / "netrc").write_text("machine a.example login a password 1\nmachine b.example login b password 2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    own = (("Authorization", f"Basic {b64encode(b'a:1').decode()}"),)
    assert headers_for("https://a.example/x", "https://a.example/m.pth", (), {}) == own
    for url in ("https://b.example/x", "https://a.example:8443/x", "http://a.example/x"):
        assert headers_for(url, "https://a.example/m.pth", (), {}) == ()


def test_header_of_the_caller_comes_before_a_token():
    given = (("authorization", "Basic mine"),)
    assert headers_for("https://github.com/a", "https://github.com/a", given, GITHUB) == given
    elsewhere = headers_for("https://github.com/a", "https://other.example/a", given, GITHUB)
    assert elsewhere == (("Authorization", "Bearer gh"),)  # a redirect to GitHub has GitHub's own


def test_other_headers_go_beside_a_token():
    assert headers_for("https://github.com/a", "https://github.com/a", GIVEN, GITHUB) == (
        *GIVEN,
        ("Authorization", "Bearer gh"),
    )


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_TOKEN_PATH": "{}/somewhere"}, "somewhere"),
        ({"HF_HOME": "{}/home"}, "home/token"),
        ({"XDG_CACHE_HOME": "{}/cache"}, "cache/huggingface/token"),
    ],
)
@pytest.mark.parametrize(("switch", "is_used"), [("", True), ("0", True), ("1", False), ("true", False)])
def test_stored_login(tmp_path, variables, place, switch, is_used):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("stored\n")
    environ = {name: text.format(tmp_path) for name, text in variables.items()}
    environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = switch
    assert authorization("https://huggingface.co/a", environ) == ("Bearer stored" if is_used else None)
    assert authorization("https://github.com/a", environ) is None
    assert authorization("https://huggingface.co/a", {**environ, **HUB}) == "Bearer hf"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"two\nlines"])
def test_stored_login_that_is_none(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    assert authorization("https://huggingface.co/a", {"HF_HOME": str(tmp_path)}) is None


def test_stored_login_in_the_home_of_nobody():
    assert authorization("https://huggingface.co/a", {"HF_HOME": "~no-such-user/hf"}) is None


@pytest.mark.parametrize(
    ("mirror", "is_for"),
    [
        ("https://host.example/b", True),
        ("https://other.example/b", False),
        ("http://host.example/b", False),
        ("https://host.example:8443/b", False),
    ],
)
def test_headers_and_mirrors(mirror, is_for):
    request = FetchRequest(
        (Url.parse("https://host.example/a"), Url.parse(mirror)), Path("/nowhere"), "a", headers=GIVEN
    )
    assert headers_of(request, Url.parse(mirror)) == (GIVEN if is_for else ())
