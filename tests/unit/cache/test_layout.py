"""Names: of cached files, of what belongs to them, and of URLs without their secrets."""

from pathlib import Path

import pytest

from rankload._cache.layout import Entry, checked_file_name, checkpoints_directory, hash_prefix_of
from rankload._urls import Url, beside, file_name_of, local_path_of, redact, url_key
from rankload.errors import ArgumentError


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("resnet50-0676ba61.tar.gz", "0676ba61"),
        ("a-b-c-0676ba61.pth", "0676ba61"),
        ("0676ba61.pth", None),
        ("resnet50.pth", None),
        ("resnet50-.pth", None),
        ("resnet-0676BA61.pth", None),
        ("resnet-v2-large.pth", None),
        ("resnet-50.pth", "50"),
        ("model-00001-of-00002.safetensors", "00002"),
        ("ckpt-20230101.pth", "20230101"),
        ("a-12.b-34.pth", "12"),
    ],
)
def test_hash_prefix_is_what_torch_reads(name, prefix):
    from torch.hub import HASH_REGEX

    assert hash_prefix_of(name) == prefix
    match = HASH_REGEX.search(name)
    assert prefix == ((match.group(1) or None) if match else None)


@pytest.mark.parametrize(
    ("url", "display_name"),
    [
        ("http://host/a/m.pth", "http://host/a/m.pth"),
        ("https://user:password@host:81/m.pth?sig=secret#token", "https://host:81/m.pth?…"),
        ("https://token@host/m.pth", "https://host/m.pth"),
        ("http://host/m.pth#secret", "http://host/m.pth"),
        ("http://host/m.pth?", "http://host/m.pth"),
        ("abfs://container@account/m.pth?sig=secret", "abfs://container@account/m.pth?…"),
        ("gs://bucket/m.pth#1111", "gs://bucket/m.pth#1111"),
        ("hdfs://user:password@host/m.pth", "hdfs://user@host/m.pth"),
    ],
)
def test_redact(url, display_name):
    assert redact(url) == display_name


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("http://host/m.pth", "HTTP://HOST/m.pth", True),
        ("http://host/m.pth", "http://user:pass@host/m.pth", True),
        ("http://host/m.pth", "http://host/m.pth#part", True),
        ("http://host/m.pth?X-Amz-Signature=a", "http://host/m.pth?X-Amz-Signature=b&X-Amz-Date=c", True),
        ("http://host/m.pth?X-Goog-Signature=a", "http://host/m.pth", True),
        ("http://host/m.pth?AWSAccessKeyId=a&Signature=b&Expires=1", "http://host/m.pth", True),
        ("http://host/m.pth?Policy=a&Key-Pair-Id=b&Signature=c", "http://host/m.pth", True),
        ("http://host/m.pth?sv=1&se=2&sr=b&sp=r&sig=c", "http://host/m.pth", True),
        ("http://host/m.pth?access_token=a", "http://host/m.pth?private_token=b", True),
        ("http://host/m.pth?apikey=a", "http://host/m.pth?api_key=b", True),
        ("http://host/m.pth", "https://host/m.pth", False),
        ("http://host/m.pth", "http://host:81/m.pth", False),
        ("http://host/m.pth", "http://host/M.pth", False),
        ("http://host/m.pth?v=1", "http://host/m.pth?v=2", False),
        ("http://host/get?file=a&token=x", "http://host/get?file=b&token=x", False),
        ("http://host/get?file=", "http://host/get", False),
        ("abfs://one@account/m.pth", "abfs://other@account/m.pth", False),
        ("gs://bucket/m.pth#1", "gs://bucket/m.pth#2", False),
        ("github://org:one@main/m.pth", "github://org:other@main/m.pth", False),
        ("github://org:one@main/m.pth", "github://org:one@Main/m.pth", False),
        ("s3://bucket/m.pth", "S3://bucket/m.pth", True),
    ],
)
def test_key_of_a_url(one, other, are_same):
    assert (url_key(one) == url_key(other)) is are_same
    assert len(url_key(one)) == 64


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/m.pth", "/a/m.pth"),
        ("file://localhost/a/m.pth", "/a/m.pth"),
        ("file:///a%20b/%25.pth", "/a b/%.pth"),
        ("/a/m.pth", "/a/m.pth"),
        ("/a%20b/m?x#y.pth", "/a%20b/m?x#y.pth"),
        ("~/m.pth", "/home/somebody/m.pth"),
        ("http://host/m.pth", None),
        ("s3://bucket/m.pth", None),
    ],
)
def test_local_path(url, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path_of(url) == (Path(path) if path else None)


def test_file_url_of_another_host():
    with pytest.raises(ArgumentError, match="file:///"):
        local_path_of("file://host/m.pth")


@pytest.mark.parametrize("url", ["http://host", "http://host/", "http://host/a/", "http://host/..", "http://host/a/."])
def test_url_without_a_file_name(url):
    with pytest.raises(ArgumentError, match="file_name="):
        file_name_of(url)


@pytest.mark.parametrize("name", ["m.pth", "a/m.pth", "m..pth", "..m", "a b.pth"])
def test_file_name_that_stays_inside(name):
    assert checked_file_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "/m.pth", "../m.pth", "a/../m.pth", "a/..", ".rankload/x"])
def test_file_name_that_leaves(name):
    with pytest.raises(ArgumentError):
        checked_file_name(name)


@pytest.mark.parametrize(
    ("url", "name", "other"),
    [
        ("https://host/a/index.json?sig=x&sr=b#y", "p 1.bin", "https://host/a/p%201.bin"),
        (
            "https://account/container/index.json?sv=1&sr=c&sig=x",
            "p.bin",
            "https://account/container/p.bin?sv=1&sr=c&sig=x",
        ),
        ("https://account/container/index.json?srt=co&sig=x", "p.bin", "https://account/container/p.bin?srt=co&sig=x"),
        ("s3://bucket/a/index.json", "p 1.bin", "s3://bucket/a/p 1.bin"),
    ],
)
def test_url_of_another_file_in_the_folder(url, name, other):
    assert beside(url, name) == other


def test_what_belongs_to_an_entry():
    entry = Entry(Path("/cache/m.pth"))
    assert entry.record_path == Path("/cache/.rankload/m.pth.json")
    assert entry.lease_path == Path("/cache/.rankload/m.pth.lease")
    separate = entry.separate(Url.parse("http://host/m.pth"))
    assert separate.path == Path("/cache/.rankload", url_key("http://host/m.pth")[:16], "m.pth")
    assert separate.record_path.parent.parent == separate.path.parent


def test_partial_of_a_long_name_fits_into_a_directory():
    for name in ("n" * 255, "\N{SNOWMAN}" * 85):
        assert len(Entry(Path(name)).partial_stem.encode()) <= 120


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCH_HOME": "/torch"}, "/torch/hub/checkpoints"),
        ({"TORCH_HOME": "~/torch"}, "/home/somebody/torch/hub/checkpoints"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/torch/hub/checkpoints"),
        ({}, "/home/somebody/.cache/torch/hub/checkpoints"),
    ],
)
def test_directory_is_torch_hubs(variables, expected, monkeypatch):
    import torch.hub

    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert checkpoints_directory() == Path(expected)
    assert checkpoints_directory(torch.hub.get_dir()) == Path(expected)
