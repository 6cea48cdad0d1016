"""torch.load's own forms, for one rank's own use."""

from __future__ import annotations

import io
import pickle

import formats
import pytest
import torch

import rankload
from harness import checkpoints
from harness.ranks import run_ranks


@pytest.mark.parametrize(
    "as_given", [str, lambda path: path, lambda path: f"file://{path}"], ids=["str", "path", "url"]
)
@pytest.mark.parametrize("write", formats.WEIGHTS)
def test_paths(tmp_path, write, as_given):
    formats.WEIGHTS[write](tmp_path / "file")
    assert rankload.load(as_given(tmp_path / "file"))["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("is_zip", [True, False])
def test_open_files(tmp_path, is_zip):
    saved = checkpoints.training_checkpoint()
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=is_zip)
    checkpoints.assert_same(rankload.load(io.BytesIO((tmp_path / "file").read_bytes())), saved)
    with (tmp_path / "file").open("rb") as file:
        checkpoints.assert_same(rankload.load(file), saved)


def test_open_files_of_safetensors(tmp_path):
    formats.write_safetensors(tmp_path / "file")
    content = b"before" + (tmp_path / "file").read_bytes()
    for mmap in (None, False):
        (file := io.BytesIO(content)).seek(6)
        found = rankload.load(file, {"cpu": "meta"} if mmap is None else None, mmap=mmap)
        assert {tensor.device.type for tensor in found.values()} == {"meta" if mmap is None else "cpu"}
    assert found["weight"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["steps"] == 7
    with (tmp_path / "file").open("rb") as file:
        assert rankload.load(file)["steps"] == 7


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"<html>no such model</html>", "text that begins '<html>"),
        (b"", "an empty file"),
        (b"GGUF\1\2\xff", "GGUF"),
        (pickle.dumps({}), "plain pickle"),
    ],
)
def test_open_files_that_are_no_checkpoints(content, got):
    file = io.BytesIO(content)
    with pytest.raises(rankload.LoadError, match=got) as caught:
        rankload.load(file)
    assert "trust" not in str(caught.value) and file.tell() == 0


def test_arguments_of_torch_load(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    names = []

    class Own:
        """A pickle module of the caller's, which sees what is loaded."""

        class Unpickler(pickle.Unpickler):
            def find_class(self, module, name):
                names.append(name)
                return super().find_class(module, name)

        load, loads = staticmethod(pickle.load), staticmethod(pickle.loads)

    found = rankload.load(tmp_path / "file", weights_only=False, pickle_module=Own, encoding="latin1")
    assert found["weight"].tolist() == [1] and "_rebuild_tensor_v2" in names


def load(rank, path):
    state_dict = rankload.load(path, map_location={"cuda:0": "cpu"})
    by_template = rankload.load(path, map_location="{device}")
    return state_dict["x"].tolist(), str(by_template["x"].device)


def test_needs_no_other_rank(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "file")
    for result in run_ranks(load, 2, args=(str(tmp_path / "file"),)):
        assert result.value == ([1, 1], "cpu")


@pytest.mark.parametrize(
    ("f", "options", "error", "text"),
    [
        ("https://host/file?sig=SECRET", {}, rankload.ArgumentError, "dist_load_state_dict_from_url"),
        (io.BytesIO(b"x"), {"mmap": True}, rankload.ArgumentError, "cannot be mapped"),
        (io.BytesIO(b"x"), {}, rankload.LoadError, "an open file"),
        ("/nowhere/file", {}, rankload.errors.MissingFileError, "/nowhere/file"),
    ],
)
def test_what_cannot_be_loaded(f, options, error, text):
    with pytest.raises(error, match=text) as caught:
        rankload.load(f, **options)
    assert "SECRET" not in str(caught.value)
