"""What comes out equals what torch.load gives, for every format, form of map_location and way of reading."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import formats
import pytest
import torch

from harness import checkpoints
from rankload._formats.sniff import sniff
from rankload._load.state_dict.read_checkpoint import read_checkpoint
from rankload.errors import DeviceError, LoadError, UnsafePickleError

CONTENTS = {"state_dict": checkpoints.state_dict, "training": checkpoints.training_checkpoint}
WRITERS = {"zip": checkpoints.write_zip, "legacy": checkpoints.write_legacy, "packed": checkpoints.write_legacy_zip}


@pytest.fixture(params=[None, True, False], ids=["default", "mapped", "copied"])
def mmap(request):
    return request.param


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("written", WRITERS)
def test_nested_checkpoints_equal_what_was_saved(tmp_path, written, content, mmap):
    saved = CONTENTS[content]()
    path = WRITERS[written](tmp_path, saved).path
    checkpoints.assert_same(read_checkpoint(path, mmap=mmap), saved)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.zip", "model"])
@pytest.mark.parametrize("write", formats.WEIGHTS)
def test_the_name_does_not_matter(tmp_path, write, name, mmap):
    path = tmp_path / name
    formats.WEIGHTS[write](path)
    loaded = read_checkpoint(path, mmap=mmap)
    assert loaded["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["steps"].item() == 7
    loaded["weight"] += 1  # writable


FORMS = {
    "none": None,
    "text": "meta",
    "device": torch.device("meta"),
    "dict": {"cpu": "meta", "cuda:0": "cpu"},
    "dict-without-cpu": {"cuda:0": "meta"},
    "callable": lambda storage, tag: torch.UntypedStorage(len(storage), device="meta"),
    "callable-none": lambda storage, tag: None,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_legacy, checkpoints.write_safetensors])
def test_every_form_of_map_location_means_what_torch_means(tmp_path, write, form, mmap):
    path = write(tmp_path).path
    loaded = read_checkpoint(path, FORMS[form], mmap=mmap)
    expected = read_checkpoint(path)
    is_meta = form not in ("none", "dict-without-cpu", "callable-none")
    assert list(loaded) == list(expected)
    for name, tensor in loaded.items():
        assert tensor.device.type == ("meta" if is_meta else "cpu")
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)


def test_a_callable_sees_each_storage_and_may_replace_it(tmp_path):
    path = checkpoints.write_safetensors(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)}).path
    seen = []

    def double(storage, tag):
        seen.append((tag, len(storage)))
        replaced = torch.UntypedStorage(len(storage))
        replaced.copy_(storage)
        torch.empty(0).set_(replaced).mul_(2)
        return replaced

    loaded = read_checkpoint(path, double)
    assert sorted(seen) == [("cpu", 8), ("cpu", 12)]
    assert loaded["a"].tolist() == [2, 2]


def test_storages_saved_on_another_device_go_where_they_are_sent(tmp_path):
    path = checkpoints.write_tagged(tmp_path, {"a": "cuda:3", "b": "cpu"}).path
    loaded = read_checkpoint(path, {"cuda:3": "cpu"})
    assert [loaded["a"].device.type, loaded["b"].device.type] == ["cpu", "cpu"]


@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_safetensors])
def test_copies_do_not_depend_on_the_file(tmp_path, write):
    path = write(tmp_path, {"a": torch.arange(100_000)}).path
    loaded = read_checkpoint(path, mmap=False)
    os.truncate(path, 0)  # would kill a process that has it mapped
    assert torch.equal(loaded["a"], torch.arange(100_000))


def test_a_recompressed_archive_is_read_right_even_when_mapping_is_asked_for(tmp_path, caplog):
    written = checkpoints.write_zip(tmp_path)
    path = tmp_path / "recompressed.pth"
    with zipfile.ZipFile(written.path) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    caplog.set_level(logging.INFO, logger="rankload")
    checkpoints.assert_same(read_checkpoint(path, mmap=True), written.content)
    assert "is read, not mapped: its tensors are compressed or not aligned" in caplog.text


def test_an_archive_repacked_without_alignment_is_read_right(tmp_path):
    written = checkpoints.write_zip(tmp_path, {"a": torch.arange(5, dtype=torch.float64)})
    path = tmp_path / "repacked.pth"
    with zipfile.ZipFile(written.path) as source, zipfile.ZipFile(path, "w") as target:
        target.writestr("model/shift", b"x")
        for member in source.infolist():
            target.writestr(member.filename.replace(written.path.stem, "model"), source.read(member))
    loaded = read_checkpoint(path)
    assert loaded["a"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["a"].data_ptr() % 8 == 0


def test_mapping_a_legacy_file_falls_back_with_a_log_line(tmp_path, caplog, capfd):
    written = checkpoints.write_legacy(tmp_path)
    caplog.set_level(logging.INFO, logger="rankload")
    checkpoints.assert_same(read_checkpoint(written.path, mmap=True), written.content)
    assert f"{written.path} is read, not mapped" in caplog.text
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("member", ["../../slipped.pth", "/slipped.pth", "a/b/model.pth", "model.safetensors"])
def test_the_member_of_a_legacy_zip_has_no_say_in_where_it_goes(tmp_path, member):
    inner = checkpoints.write_legacy(tmp_path / "inner")
    directory = tmp_path / "a" / "b" / "cache"
    directory.mkdir(parents=True)
    with zipfile.ZipFile(directory / "model.zip", "w") as archive:
        archive.write(inner.path, member)
    checkpoints.assert_same(read_checkpoint(directory / "model.zip"), inner.content)
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["model.zip"]


@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_safetensors])
def test_a_legacy_zip_may_hold_any_format(tmp_path, write):
    inner = write(tmp_path)
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner.path, "model.bin")
    assert sniff(path) == "single_member_zip"
    checkpoints.assert_same(dict(read_checkpoint(path)), dict(read_checkpoint(inner.path)))


def test_a_damaged_legacy_zip_is_an_error(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", pickle.dumps("x" * 1000))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"xxx", b"xyx"))
    with pytest.raises(LoadError, match="Bad CRC-32"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", [1, 4])
def test_legacy_files_of_other_pickle_protocols_load_when_trusted(tmp_path, protocol):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert read_checkpoint(path, weights_only=False)["a"].tolist() == [1, 1]


def test_torchscript_loads_when_trusted(tmp_path):
    formats.write_torchscript(tmp_path / "model.pt")
    with pytest.raises(UnsafePickleError, match="weights_only=True cannot load a TorchScript archive"):
        read_checkpoint(tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="TorchScript"):
        module = read_checkpoint(tmp_path / "model.pt", weights_only=False)
    assert module(torch.zeros(1, 2)).shape == (1, 1)


def test_the_tar_format_loads_when_trusted(tmp_path):
    formats.write_tar(tmp_path / "model.pth")
    with pytest.raises(UnsafePickleError, match="weights_only=True cannot load a checkpoint of torch's tar format"):
        read_checkpoint(tmp_path / "model.pth")
    loaded = read_checkpoint(tmp_path / "model.pth", weights_only=False)
    assert loaded["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Schedule:
    """A class that weights_only does not know."""


def test_a_refused_class_is_named_with_the_way_out(tmp_path):
    path = checkpoints.write_zip(tmp_path, {"a": torch.ones(2), "schedule": Schedule()}).path
    with pytest.raises(UnsafePickleError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: weights_only=True refused the file, which wants to use ")
    assert f"add_safe_globals([{Schedule.__module__}.Schedule])" in message
    assert "weights_only=False only if you trust" in message
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert "Weights only load failed" in str(caught.value.__cause__)
    assert "\x1b" not in message + str(caught.value.__cause__)
    assert type(read_checkpoint(path, weights_only=False)["schedule"]) is Schedule
    with torch.serialization.safe_globals([Schedule]):
        assert type(read_checkpoint(path)["schedule"]) is Schedule


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("write", WRITERS.values())
def test_code_in_the_file_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, {"a": Attack()}).path
    with pytest.raises(UnsafePickleError, match=r"mkdir.* is blocked\. Pass weights_only=False only if you trust"):
        read_checkpoint(path)
    assert not Path("attacked").exists()


def test_forcing_weights_only_by_environment_works(tmp_path, monkeypatch):
    path = checkpoints.write_zip(tmp_path, {"schedule": Schedule()}).path
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnsafePickleError):
        read_checkpoint(path, weights_only=False)


def test_arguments_reach_torch_load(tmp_path):
    path = checkpoints.write_zip(tmp_path, {"a": torch.ones(2)}).path

    class Pickle:
        __name__ = "counting"
        count = 0

        class Unpickler(pickle.Unpickler):
            def __init__(self, file, **arguments):
                Pickle.count += arguments["encoding"] == "latin1"
                super().__init__(file, **arguments)

    read_checkpoint(path, weights_only=False, pickle_module=Pickle, encoding="latin1")
    assert Pickle.count == 1


def test_what_torch_says_reaches_the_user(tmp_path):
    path = checkpoints.write_zip(tmp_path).path
    expected = (
        r"torch could not load a checkpoint of torch's zip format of \d+ bytes: RuntimeError: .*tagged with mars:1"
    )
    with pytest.raises(LoadError, match=expected):
        read_checkpoint(path, "mars:1")


def test_too_little_memory_names_the_size(tmp_path):
    path = checkpoints.write_zip(tmp_path).path

    def exhaust(storage, tag):
        return bytearray(1 << 62)

    with pytest.raises(LoadError, match=f"not enough memory to load {path.stat().st_size} bytes") as caught:
        read_checkpoint(path, exhaust)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_our_own_errors_pass_through(tmp_path):
    path = checkpoints.write_zip(tmp_path).path

    def refuse(storage, tag):
        raise DeviceError("no device fits")

    with pytest.raises(DeviceError, match="no device fits"):
        read_checkpoint(path, refuse)


@pytest.mark.parametrize(
    ("content", "got"),
    [(b"<html>no</html>", "text that begins '<html>no</html>'"), (b"PK\x03\x04 no", "truncated zip archive")],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, got):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=f"expected a checkpoint, got {got}"):
        read_checkpoint(path)


def test_a_file_that_is_gone(tmp_path):
    """As torch.load says it: scripts go on without one then."""
    with pytest.raises(FileNotFoundError, match=r"cannot read .*gone\.pth: no such file"):
        read_checkpoint(tmp_path / "gone.pth")


def test_a_record_shorter_than_its_tensor_is_an_error_not_a_crash(tmp_path):
    written = checkpoints.write_zip(tmp_path, OrderedDict(a=torch.arange(1000)))
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(written.path) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            target.writestr(member.filename, content[:16] if member.filename.endswith("/data/0") else content)
    for mmap in (True, False):
        with pytest.raises(LoadError):
            read_checkpoint(path, mmap=mmap)
