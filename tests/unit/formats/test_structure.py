"""What passes as a checkpoint, what does not, and what the message says."""

from __future__ import annotations

import cProfile
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rankload
from rankload._formats.sniff import check_structure, sniff
from rankload.errors import NotACheckpointError

ORIGIN = "https://weights.example/model.pth"


def check(path: Path, must_be_checkpoint: bool = True) -> str:
    return check_structure(path, must_be_checkpoint=must_be_checkpoint, origin=ORIGIN)


def refusal(path: Path, must_be_checkpoint: bool = True) -> str:
    with pytest.raises(NotACheckpointError) as caught:
        check(path, must_be_checkpoint)
    return caught.value.got


def test_every_format_is_told_by_content(checkpoint):
    file_format, path = checkpoint
    for name in ("model.safetensors", "model.pth", "model.zip", "model"):
        renamed = path.rename(path.with_name(name))
        assert sniff(renamed) == file_format
        assert check(renamed) == file_format
        path = renamed


@pytest.mark.fault(2)
def test_a_file_cut_off_anywhere_is_refused(checkpoint):
    _, path = checkpoint
    size_bytes = path.stat().st_size
    accepted = []
    for length in reversed(range(size_bytes)):
        os.truncate(path, length)
        try:
            check(path)
        except NotACheckpointError:
            continue
        accepted.append(length)
    assert not accepted, f"accepted with {accepted[:10]} of {size_bytes} bytes"


@pytest.mark.parametrize("first_recognisable_byte", [9])
def test_a_broken_archive_is_refused_even_where_any_file_would_do(tmp_path, first_recognisable_byte):
    for write in (
        lambda path: torch.save({"a": torch.ones(3)}, path),
        lambda path: save_file({"a": torch.ones(3)}, path),
    ):
        path = tmp_path / "file"
        write(path)
        for length in reversed(range(first_recognisable_byte, path.stat().st_size)):
            os.truncate(path, length)
            assert refusal(path, must_be_checkpoint=False)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"<html><body>404 Not Found</body></html>", "text that begins '<html><body>404 Not Found</body></html>'"),
        (
            b"\xef\xbb\xbf\n <!DOCTYPE html>\n<title>Sign  in</title>",
            "text that begins '<!DOCTYPE html> <title>Sign in</title>'",
        ),
        (b'{"error": "no such key"}', """text that begins '{"error": "no such key"}'"""),
        ("Ungültige Anfrage. ".encode() * 100, "text that begins 'Ungültige Anfrage. "),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a Git LFS pointer, not the file that it stands for",
        ),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip-compressed content"),
        (pickle.dumps({"a": 1}), "a plain pickle, not written by torch.save"),
        (bytes(range(128, 192)), "a file that begins with the bytes 80 81 82 83"),
    ],
    ids=["html", "html-with-bom", "json", "long-text", "git-lfs", "gzip", "pickle", "noise"],
)
def test_a_stranger_is_named(tmp_path, content, got):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert refusal(path).startswith(got)
    check(path, must_be_checkpoint=False)


def test_the_message_says_where_it_came_from_and_what_it_is(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"<html>no</html>")
    with pytest.raises(NotACheckpointError) as caught:
        check(path)
    assert str(caught.value) == (
        f"{ORIGIN}: expected a checkpoint, got text that begins '<html>no</html>' (file {path}, 15 bytes)"
    )
    assert (caught.value.path, caught.value.origin, caught.value.size_bytes) == (str(path), ORIGIN, 15)


@pytest.mark.parametrize("must_be_checkpoint", [True, False])
def test_an_empty_file_is_always_refused(tmp_path, must_be_checkpoint):
    path = tmp_path / "model.pth"
    path.touch()
    assert refusal(path, must_be_checkpoint) == "an empty file"


def test_a_zip_or_tar_of_images_is_no_checkpoint(tmp_path):
    archive_path = tmp_path / "images.pth"
    with zipfile.ZipFile(archive_path, "w") as archive:
        archive.writestr("0.jpg", b"\xff\xd8\xff")
        archive.writestr("1.jpg", b"\xff\xd8\xff")
    assert refusal(archive_path) == "a zip archive that torch.save did not write"
    assert check(archive_path, must_be_checkpoint=False) == "zip"
    tar_path = tmp_path / "images.tar"
    with tarfile.open(tar_path, "w") as archive:
        archive.add(archive_path, "images")
    assert refusal(tar_path) == "a tar archive that torch.save did not write"
    assert check(tar_path, must_be_checkpoint=False) == "tar"


def test_a_zip_of_one_web_page_is_no_checkpoint(tmp_path):
    path = tmp_path / "page.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.html", b"<html>sorry</html>")
    assert refusal(path) == "a zip archive of one file, 'index.html', with text that begins '<html>sorry</html>'"
    assert check(path, must_be_checkpoint=False) == "single_member_zip"


def test_an_archive_cut_right_behind_an_archive_inside_it_is_refused(tmp_path):
    path, inner = tmp_path / "outer", tmp_path / "inner"
    torch.save({"a": torch.ones(3)}, inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "model.pth")
        begin = archive.getinfo("model.pth").header_offset + 30 + len("model.pth")
    os.truncate(path, begin + inner.stat().st_size)
    assert zipfile.is_zipfile(path)  # the standard library is taken in
    assert "damaged or truncated zip archive" in refusal(path)


@pytest.mark.parametrize("more", [b"\n", b"\r\n", bytes(1000), b"<!-- served by a proxy -->"])
def test_bytes_behind_the_end_of_an_archive(tmp_path, more):
    """torch.load takes such files."""
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(300.0)}, path)
    with path.open("ab") as file:
        file.write(more)
    assert torch.equal(torch.load(path)["a"], torch.arange(300.0))
    assert check(path) == "torch_zip"
    assert torch.equal(rankload.load(path)["a"], torch.arange(300.0))
    with rankload.open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint["a"], torch.arange(300.0))


def test_more_bytes_behind_an_archive_than_torch_skips(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(300.0)}, path)
    with path.open("ab") as file:
        file.write(bytes(70_000))
    assert refusal(path) == "truncated zip archive, or one with other data after its end (no directory there)"


def test_a_hole_over_a_header_is_found(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (member,) = (member for member in archive.infolist() if member.filename.endswith("data/1"))
    content[member.header_offset : member.header_offset + 30] = bytes(30)
    path.write_bytes(content)
    assert refusal(path).startswith("damaged zip archive (no header of 'model/data/1'")


def test_missing_bytes_in_the_middle_are_found(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(300)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:200] + content[264:])
    assert "truncated zip archive" in refusal(path)


def test_a_name_listed_twice_is_found(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/data.pkl", b"\x80\x02N.")
        archive.writestr("model/data.pkl", b"\x80\x02N.")
    assert refusal(path) == "zip archive that lists a name twice"


def test_archives_with_comments_and_64_bit_fields_pass(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    with monkeypatch.context() as patch, zipfile.ZipFile(path, "w") as archive:
        patch.setattr(zipfile, "ZIP64_LIMIT", 10)  # as if each were larger than 4 GB
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
        archive.comment = b"PK\x05\x06 is how the last record begins, too"
        for name in ("data.pkl", "data/0", "version"):
            with archive.open(f"model/{name}", "w", force_zip64=True) as member:
                member.write(b"some content of the member " * 3)
        archive.close()
    assert check(path) == "torch_zip"
    for length in reversed(range(path.stat().st_size - 200, path.stat().st_size)):
        os.truncate(path, length)
        assert refusal(path)


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": place}
            for name, (dtype, shape, place) in tensors.items()
        }
    ).encode()


@pytest.mark.parametrize(
    ("text", "payload_bytes", "got"),
    [
        (header(a=("F32", [2], [0, 8])), 4, "truncated safetensors file"),
        (header(a=("F32", [2], [0, 8])), 12, "bytes after its end"),
        (header(a=("F32", [3], [0, 8])), 8, "gives 8 bytes to 'a', F32 [3]"),
        (header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), 12, "'b' overlaps the tensor before it"),
        (header(a=("F32", [2], [0, 8]), b=("F32", [2], [12, 20])), 20, "'b' leaves a gap before it"),
        (header(a=("F32", [2], [-8, 0])), 0, "puts 'a' at bytes -8 to 0"),
        (header(a=("F32", [-1, -2], [0, 8])), 8, "'a' has sizes that no tensor can have"),
        (header(a=("U8", [10**30, 10**30], [0, 8])), 8, "'a' has sizes that no tensor can have"),
        (header(a=("U8", [0, *[1] * 64], [0, 0])), 0, "'a' has sizes that no tensor can have"),
        (header(a=("U8", [0, 2**62, 2], [0, 0])), 0, "'a' has sizes that no tensor can have"),
        (header(a=("U8", [0, 8], [0, 8])), 8, "gives 8 bytes to 'a'"),
        (header(a=("U8", [10**30, 0], [0, 8])), 8, "'a' has sizes that no tensor can have"),
        (b'{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', 1, "has an invalid entry for 'a'"),
        (b'{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}', 1, "has an invalid entry for 'a'"),
        (b'{"a": {"dtype": "U8", "shape": [1]}}', 1, "has an invalid entry for 'a'"),
        (b'{"a": 5}', 0, "has an invalid entry for 'a'"),
        (b'{"__metadata__": {"a": 5}}', 0, "__metadata__"),
        (b'{"a": {}, "a": {}}', 0, "has a duplicate key"),
        (b'{"a": ', 0, "is not JSON"),
        (b'{"\xff": 0}', 0, "is not JSON"),
        (b'{"a": ' + b"[" * 100_000, 0, "is not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "safetensors file"),
    ],
)
def test_a_safetensors_header_that_lies_is_found(tmp_path, text, payload_bytes, got):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(payload_bytes))
    assert got in refusal(path)
    assert got in refusal(path, must_be_checkpoint=False)


@pytest.mark.parametrize(("length", "got"), [(200_000_000, "100 MB"), (2**47, "100 MB"), (90_000_000, "truncated")])
def test_a_safetensors_header_length_that_lies_allocates_nothing(tmp_path, length, got):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert got in refusal(path)


def test_a_dtype_of_a_newer_safetensors_is_left_to_the_loader(tmp_path):
    path = tmp_path / "model.safetensors"
    text = header(a=("F128", [2], [0, 32]))
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    assert check(path) == "safetensors"


def test_cost_grows_with_the_number_of_tensors_and_no_faster(tmp_path):
    """Counted in calls of functions, which no other program on the machine changes."""

    def calls_for(count: int, name: str) -> int:
        state_dict = {f"layers.{index}.weight": torch.zeros(3, 5) for index in range(count)}
        path = tmp_path / f"{name}-{count}"
        torch.save(state_dict, path) if name == "zip" else save_file(state_dict, path)
        check(path)  # whatever only a first call does
        profile = cProfile.Profile()
        profile.runcall(check, path)
        return sum(entry.callcount for entry in profile.getstats())

    for name in ("zip", "safetensors"):
        of_500, of_1000 = calls_for(500, name), calls_for(1000, name)
        assert of_500 < of_1000 < 2.1 * of_500 and of_1000 < 40 * 1000, (name, of_500, of_1000)


def test_a_login_node_needs_no_torch():
    code = "import sys, rankload._formats.sniff; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
