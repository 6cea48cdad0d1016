"""``import rankload.hub as hub``: torch.hub's surface, directories, names and words."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
import torch.hub
import torch.utils.model_zoo

import rankload
from harness import checkpoints
from harness.origin import Origin
from harness.rank import mark, wait_for_gate
from harness.ranks import run_ranks, start_ranks
from harness.scripts import run_script


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoints.write_zip(tmp_path / "source")


def parameters(function):
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", rankload.hub.__all__)
def test_signature_is_torchs(name):
    assert parameters(getattr(rankload.hub, name)) == parameters(getattr(torch.hub, name))


def test_signature_of_load_url_is_torchs():
    assert parameters(rankload.model_zoo.load_url) == parameters(torch.utils.model_zoo.load_url)


def test_loads_what_torch_hub_loads(origin, checkpoint, tmp_path):
    url = origin.add(checkpoint.name, checkpoint.path)
    ours = rankload.hub.load_state_dict_from_url(url, str(tmp_path / "ours"), None, False, True)
    theirs = torch.hub.load_state_dict_from_url(url, str(tmp_path / "theirs"), None, False, True)
    checkpoints.assert_same(ours, theirs)
    checkpoints.assert_same(rankload.model_zoo.load_url(url, str(tmp_path / "ours")), theirs)
    assert origin.request_count() == 2


URLS = [
    "/model.pth",
    "/a/b/model-0676ba61.pth",
    "/model.pth?download=true",
    "/model.pth?file=/other/name.bin&x=1",
    "/model.pth#fragment",
    "/model%20name%2Bv1.pth",
    "/model%2Fname.pth",
    "/model+name@v1.pth",
    "/model.pth;v=1",
    "/resolve/main/model.bin?download=true",
    "//double//slash.pth",
    "/m%C3%B6del.pth",
]


@pytest.mark.parametrize("path", URLS)
def test_file_name_is_torchs(checkpoint, tmp_path, path):
    """What one of them has fetched the other one finds."""
    with Origin() as server:
        for name in {path.partition("?")[0].partition("#")[0].lstrip("/"), "double//slash.pth", "/double//slash.pth"}:
            server.add(_unquoted(name), checkpoint.path)
        url = server.base_url + path
        torch.hub.load_state_dict_from_url(url, str(tmp_path / "cache"), progress=False)
        [found] = (tmp_path / "cache").iterdir()
        assert rankload.dist_fetch(url, tmp_path / "cache") == found
        assert server.request_count() == 2  # and one to ask the origin whether it is its file


def test_directory_is_shared_with_torch_hub(origin, checkpoint, monkeypatch, tmp_path):
    url = origin.add("model.pth", checkpoint.path)
    for variable, value in (("XDG_CACHE_HOME", tmp_path / "xdg"), ("TORCH_HOME", tmp_path / "home")):
        monkeypatch.delenv("TORCH_HOME", raising=False)
        monkeypatch.setenv(variable, str(value))
        assert rankload.hub.get_dir() == torch.hub.get_dir()
        rankload.hub.load_state_dict_from_url(url)
        assert Path(torch.hub.get_dir(), "checkpoints", "model.pth").exists()
        assert str(value) in torch.hub.get_dir()


def test_set_dir_is_torch_hubs(origin, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # put back at the end
    rankload.hub.set_dir(str(tmp_path / "set"))
    assert torch.hub.get_dir() == rankload.hub.get_dir() == str(tmp_path / "set")
    rankload.hub.load_state_dict_from_url(origin.add("model.pth", checkpoint.path))
    assert (tmp_path / "set" / "checkpoints" / "model.pth").exists()


def test_downloading_goes_to_the_log_and_nothing_to_stdout(origin, checkpoint, tmp_path):
    url = origin.add("model.pth", checkpoint.path)
    code = f"""
import logging
logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
import rankload.hub as hub
hub.load_state_dict_from_url({url!r}, {str(tmp_path / "cache")!r})
"""
    result = run_script(code).check()
    assert result.stdout == ""
    assert f'rankload: Downloading: "{url}" to {tmp_path / "cache" / "model.pth"}' in result.stderr


def test_errors_are_in_torchs_words(origin, checkpoint, tmp_path):
    import urllib.error

    url = origin.add("model-0badc0de.pth", checkpoint.path)
    with pytest.raises(RuntimeError, match=r'invalid hash value \(expected "0badc0de", got "[0-9a-f]{64}"\)'):
        rankload.hub.load_state_dict_from_url(url, str(tmp_path / "cache"), check_hash=True)
    with pytest.raises(urllib.error.URLError, match="HTTP Error 404: Not Found") as caught:
        rankload.hub.load_state_dict_from_url(origin.url("none.pth"), str(tmp_path / "cache"))
    assert caught.value.code == 404
    assert "404" in caught.value.reason


# download_url_to_file


@pytest.mark.parametrize("prefix", [None, "", 4, 8, 64])
def test_plain_download(origin, checkpoint, tmp_path, prefix):
    destination = tmp_path / "there.pth"
    prefix = checkpoint.sha256[:prefix] if isinstance(prefix, int) else prefix
    assert rankload.hub.download_url_to_file(origin.add("m.pth", checkpoint.path), str(destination), prefix) is None
    assert destination.read_bytes() == checkpoint.path.read_bytes()


def test_plain_download_needs_no_checkpoint(origin, tmp_path):
    rankload.hub.download_url_to_file(origin.add("labels.txt", b"cat\ndog\n"), str(tmp_path / "labels.txt"))
    assert (tmp_path / "labels.txt").read_bytes() == b"cat\ndog\n"


def test_plain_download_leaves_nothing_beside_the_file(origin, tmp_path):
    rankload.hub.download_url_to_file(origin.add("file.bin", b"content"), str(tmp_path / "file.bin"))
    assert os.listdir(tmp_path) == ["file.bin"]


def test_plain_download_with_a_wrong_prefix_keeps_the_old_file(origin, tmp_path):
    destination = tmp_path / "file.bin"
    destination.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=r'invalid hash value \(expected "0bad", got'):
        rankload.hub.download_url_to_file(origin.add("f", b"content"), str(destination), "0bad")
    assert destination.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("fault", [{"status": 500}, {"truncate_at": 3, "ranges": "ignored"}])
def test_plain_download_that_fails_keeps_the_old_file(origin, tmp_path, fault):
    destination = tmp_path / "file.bin"
    destination.write_bytes(b"old")
    with pytest.raises(rankload.FetchError):
        rankload.hub.download_url_to_file(origin.add("f", b"content", **fault), str(destination))
    assert destination.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_plain_download_replaces_the_old_file_atomically(origin, tmp_path):
    destination = tmp_path / "file.bin"
    destination.write_bytes(b"old")
    with destination.open("rb") as reader:
        rankload.hub.download_url_to_file(origin.add("f", b"content"), str(destination))
        assert reader.read() == b"old"
    assert destination.read_bytes() == b"content"


def test_plain_download_expands_the_tilde(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rankload.hub.download_url_to_file(origin.add("f", b"content"), "~/file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"content"


def test_plain_download_to_a_directory_that_is_not_there(origin, tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        rankload.hub.download_url_to_file(origin.add("f", b"content"), str(tmp_path / "none" / "file.bin"))


def test_plain_download_to_a_directory(origin, tmp_path):
    with pytest.raises(rankload.CacheError, match="Is a directory"):
        rankload.hub.download_url_to_file(origin.add("f", b"content"), str(tmp_path))
    assert origin.request_count() == 0


@pytest.mark.parametrize("prefix", [None, "ed7002b439e9ac84"])
def test_plain_download_of_a_file_url(tmp_path, prefix):
    """torch.hub copies it."""
    (tmp_path / "source.bin").write_bytes(b"content")
    url = (tmp_path / "source.bin").as_uri()
    rankload.hub.download_url_to_file(url, str(tmp_path / "file.bin"), prefix)
    assert (tmp_path / "file.bin").read_bytes() == b"content"
    with pytest.raises(RuntimeError, match="invalid hash value"):
        rankload.hub.download_url_to_file(url, str(tmp_path / "other.bin"), "0bad")
    assert not (tmp_path / "other.bin").exists()


# in a job of several ranks


def load_on_rank_0(rank, url, directory):
    import rankload.hub as hub

    if rank == 0:
        return len(hub.load_state_dict_from_url(url, directory))
    return None


def load_everywhere(rank, url, directory):
    import rankload.hub as hub

    mark("begins")
    wait_for_gate("go")
    return len(hub.load_state_dict_from_url(url, directory))


def test_under_if_rank_is_0_nobody_waits(origin, checkpoint, tmp_path):
    url = origin.add("model.pth", checkpoint.path)
    results = run_ranks(load_on_rank_0, 2, args=(url, str(tmp_path / "cache")), timeout_seconds=30)
    assert [result.value for result in results] == [len(checkpoint.content), None]


def test_every_rank_at_once_downloads_once(origin, checkpoint, tmp_path):
    url = origin.add("model.pth", checkpoint.path)
    with start_ranks(load_everywhere, 4, args=(url, str(tmp_path / "cache"))) as group:
        group.wait_for_mark("begins")
        group.open_gate("go")
        assert [result.value for result in group.wait()] == [len(checkpoint.content)] * 4
    assert origin.request_count() == 1


def _unquoted(name: str) -> str:
    from urllib.parse import unquote

    return unquote(name)


def test_local_repository_and_the_rest_of_torch_hub(tmp_path):
    """Scripts that replace the module also use what fetches no file."""
    (tmp_path / "hubconf.py").write_text(
        'dependencies = []\n\n\ndef net(size):\n    """A net."""\n    return size + 1\n'
    )
    assert rankload.hub.HASH_REGEX is torch.hub.HASH_REGEX
    assert rankload.hub.load(str(tmp_path), "net", 2, source="local") == 3
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        rankload.hub.nothing_of_the_kind  # noqa: B018


def test_legacy_zip_warns_as_torch_hub_does(origin, tmp_path):
    path = checkpoints.write_legacy_zip(tmp_path / "source").path
    url = origin.add(path.name, path)
    with pytest.warns(FutureWarning, match="deprecated in favor of default zipfile format") as ours:
        rankload.hub.load_state_dict_from_url(url, str(tmp_path / "ours"), progress=False)
    with pytest.warns(FutureWarning) as theirs:
        torch.hub.load_state_dict_from_url(url, str(tmp_path / "theirs"), progress=False)
    assert [str(one.message) for one in ours] == [str(one.message) for one in theirs]
    assert ours[0].filename == __file__
