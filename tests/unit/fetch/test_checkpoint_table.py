"""Tables of named checkpoints: what is accepted, what is refused, and which table a name is looked for in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rankload._fetch.checkpoint_table import NamedCheckpoint, find_checkpoint, named_in, read_table
from rankload.errors import ArgumentError, MissingFileError

DIGEST = "0a" * 32

ALL_KEYS = f"""
# a comment
[all.parts]
"model-00001-of-00002.safetensors" = "{DIGEST}"

[few]
url = "weights/few.pth"

["with.dots-1_x+"]
url = "https://host/x.pth"
"""


def write(directory: Path, text: str, name: str = "rankload.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_all_keys(tmp_path: Path) -> None:
    row = (
        f'[all]\nurl = ["https://host/a.pth", "https://mirror/a.pth"]\nsha256 = "{DIGEST}"\nsize = 12\n'
        'licence = "MIT"\nadapt = ["unwrap", { strip_prefix = "module." }, { rename = ["^a", "b"] }]\n'
    )
    path = write(tmp_path, row + ALL_KEYS)
    table = read_table(path)
    assert list(table) == ["all", "few", "with.dots-1_x+"]
    assert table["all"] == NamedCheckpoint(
        "all",
        path,
        ("https://host/a.pth", "https://mirror/a.pth"),
        DIGEST,
        12,
        (("model-00001-of-00002.safetensors", DIGEST),),
        "MIT",
        (("unwrap", ()), ("strip_prefix", ("module.",)), ("rename", ("^a", "b"))),
    )
    assert table["few"].urls == (str(tmp_path / "weights" / "few.pth"),)


def test_adapters_in_order(tmp_path: Path) -> None:
    adapt = '["unwrap", { strip_prefix = "module." }, { rename = ["^a", "b"] }, { to_dtype = "bfloat16" }]'
    path = write(tmp_path, f'[x]\nurl = "x.pth"\nadapt = {adapt}\n')
    checkpoint = {"state_dict": {"module.a": torch.ones(2)}}
    for adapter in read_table(path)["x"].adapters():
        checkpoint = adapter(checkpoint)
    assert list(checkpoint) == ["b"] and checkpoint["b"].dtype is torch.bfloat16


def test_dtype_that_torch_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, '[x]\nurl = "x.pth"\nadapt = [{ to_dtype = "float1" }]\n')
    [adapter] = read_table(path)["x"].adapters()
    with pytest.raises(ArgumentError, match=r"to_dtype\('float1'\)"):
        adapter({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "not TOML"),
        ("\xff", "not TOML"),
        ('url = "https://host/a.pth"', "url is outside a row"),
        ("[x]", "url: expected a URL or a list of mirrors"),
        ("[x]\nurl = []", "url: expected"),
        ('[x]\nurl = ""', "url: expected"),
        ('[x]\nurl = "a"\nsha265 = "b"', "unknown key sha265; did you mean sha256"),
        ('[x]\nurl = "a"\nsha256 = "0123"', "sha256: expected 64"),
        ('[x]\nurl = "a"\nsize = "12"', "size: expected"),
        ('[x]\nurl = "a"\nsize = -1', "size: expected"),
        ('[x]\nurl = "a"\nparts = 3', "parts: expected"),
        ('[x]\nurl = "a"\n[x.parts]\n"a.safetensors" = 3', "parts.a.safetensors: expected 64"),
        ('[x]\nurl = "a"\nlicence = 3', "licence: expected"),
        ('[x]\nurl = "a"\nadapt = ["match_shapes"]', "adapt: expected"),
        ('[x]\nurl = "a"\nadapt = "unwrap"', "adapt: expected"),
        ('[x]\nurl = "a"\nadapt = [{ unwrap = 3 }]', "adapt: expected"),
        ('[x]\nurl = "a"\nadapt = ["__import__"]', "adapt: expected"),
        ('[x]\nurl = "a"\nadapt = 5', "adapt: expected a list"),
        ('[x]\nurl = "a"\nadapt = { unwrap = "a" }', "adapt: expected a list"),
        ('[x]\nurl = "a"\nurl = "b"', "not TOML: .*url"),
        ('["a/b"]\nurl = "a"', r"\[a/b\]: expected a name"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rankload.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ArgumentError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_where_a_name_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("small") is None
    write(tmp_path, '[small]\nurl = "https://host/here.pth"\n')
    other = write(tmp_path, '[small]\nurl = "https://host/other.pth"\n', "other.toml")
    found = find_checkpoint("small")
    assert found is not None and found.urls == ("https://host/here.pth",)
    monkeypatch.setenv("RANKLOAD_TABLE", str(other))
    found = find_checkpoint("small")
    assert found is not None and found.urls == ("https://host/other.pth",)
    for path_or_url in ("./small", "https://host/small", "unknown", Path("small"), ["small"], None):
        assert find_checkpoint(path_or_url) is None
    (tmp_path / "small").write_bytes(b"")
    assert find_checkpoint("small") is None  # a file of that name comes first


def install(directory: Path, package: str, table: str) -> None:
    """Put a package that registers a table into a directory of installed packages."""
    (directory / package).mkdir(parents=True)
    (directory / package / "__init__.py").touch()
    write(directory / package, table)
    metadata = directory / f"{package}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[rankload.checkpoints]\n{package} = {package}\n")


def test_tables_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install(site, "zoo_one", '[small]\nurl = "https://host/one.pth"\n[both]\nurl = "a.pth"\n')
    install(site, "zoo_two", '[large]\nurl = "https://host/two.pth"\n[both]\nurl = "https://host/b.pth"\n')
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.chdir(tmp_path)
    for name, url in (("small", "https://host/one.pth"), ("large", "https://host/two.pth")):
        found = find_checkpoint(name)
        assert found is not None and found.urls == (url,)
    with pytest.raises(ArgumentError, match=r"zoo_one.* and .*zoo_two.*different checkpoints of this name"):
        find_checkpoint("both")


def test_package_that_is_registered_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "zoo_gone", "")
    (tmp_path / "zoo_gone-1.dist-info" / "entry_points.txt").write_text("[rankload.checkpoints]\nx = zoo_nowhere\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ArgumentError, match=r"entry point x of rankload.checkpoints"):
        find_checkpoint("small")


def test_table_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, '[small]\nurl = "https://host/a.pth"\n')
    assert named_in(path, "small").urls == ("https://host/a.pth",)
    with pytest.raises(ArgumentError, match=r"'smal' is not in .*did you mean small"):
        named_in(path, "smal")
    with pytest.raises(MissingFileError):
        named_in(tmp_path / "nowhere.toml", "small")


@pytest.mark.parametrize("arguments", ['"a"', '["a", "b", "c"]'])
def test_adapters_with_too_few_or_too_many_arguments(tmp_path: Path, arguments: str) -> None:
    path = tmp_path / "rankload.toml"
    path.write_text(f'[x]\nurl = "a"\nadapt = [{{ rename = {arguments} }}]')
    with pytest.raises(ArgumentError, match=r"rankload\.toml: \[x\]: adapt: rename"):
        read_table(path)["x"].adapters()
