"""Systems that lack what is usually there: room in TMPDIR, /dev/fd, /proc, /dev/shm."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from harness import disks, mounts
from harness.scripts import run_program

pytestmark = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))

#: Loads the same weights in every way that needs a temporary file, a temporary folder, or a path to an open file.
LOADS = """
import sys, torch, rankload
folder = sys.argv[1]

class Stream:  # a file object that has no descriptor, and cannot seek: it has to be copied
    def __init__(self, path):
        self.file = open(path, "rb")
        self.read = self.file.read
        self.readline = self.file.readline

ways = {
    "local": lambda: rankload.dist_load_state_dict_from_url(f"{folder}/model.pth"),
    "packed": lambda: rankload.load(f"{folder}/packed.pth"),
    "packed for the node": lambda: rankload.dist_load_state_dict_from_url(f"{folder}/packed.pth"),
    "index of a packed one": lambda: {"w": rankload.open_checkpoint(f"{folder}/packed.pth")["w"].read()},
    "cached": lambda: rankload.dist_load_state_dict_from_url(f"file://{folder}/model.pth", folder + "/cache"),
}
for name, way in ways.items():
    if name in sys.argv[2:]:
        try:
            found = way()
        except rankload.RankloadError as error:
            print(f"{name}: {type(error).__name__}: {error}")
        else:
            print(f"{name}: {found['w'].sum().item()}")
"""

ALL = ("local", "packed", "packed for the node")

#: /dev with nothing in it but what every program needs, and a /dev/shm of one page.
BARE_DEV = """
mkdir -p "$1/dev"; mount -t tmpfs dev "$1/dev"
for name in null zero random urandom; do touch "$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"; done
if [ -n "$TINY_SHM" ]; then mkdir "$1/dev/shm"; mount -t tmpfs -o size=4k shm "$1/dev/shm"; fi
mount --rbind "$1/dev" /dev
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of 4 MB, and the same in an archive, as torch.hub knows it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save({"w": torch.ones(1_000_000)}, folder / "model.pth")
    with zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "model.pth", "model.pth")
    return folder


def outcomes(python, folder, ways, *, before="", env=None):
    """What each way of loading comes to, in a mount namespace of its own in which ``before`` has run."""
    script = f'{before}\nexec "$2" -c "$3" "$1" "$4" "$5" "$6"'
    words = [*ways, "", "", ""][:3]
    result = run_program(
        ["unshare", "--mount", "sh", "-euc", script, "sh", folder, python, LOADS, *words], env=env, timeout_seconds=100
    ).check()
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


@pytest.fixture
def python():
    import sys

    return sys.executable


@pytest.mark.fault(82)
@pytest.mark.parametrize("kind", ["full", "small", "no inodes", "missing", "read-only", "a file"])
def test_tmpdir_that_cannot_be_used(tmp_path, folder, python, kind):
    """Another directory serves."""
    directory = tmp_path / "tmp"
    with disks.tmpfs(directory, size_bytes=1 << 20, inodes=2 if kind == "no inodes" else 0):
        if kind == "full":
            with pytest.raises(OSError, match="No space"):
                (directory / "filler").write_bytes(bytes(2 << 20))
        before = f'mount -o remount,ro "{directory}"' if kind == "read-only" else ""
        if kind == "a file":
            directory = directory / "file"
            directory.touch()
        env = {"TMPDIR": str(directory / "absent" if kind == "missing" else directory)}
        found = outcomes(python, folder, ALL, before=before, env=env)
    assert found == dict.fromkeys(ALL, "1000000.0")


@pytest.mark.fault(82)
def test_no_directory_has_room_for_a_temporary_file(folder, python):
    """The error names them, what is needed and what there is."""
    root = Path(__file__).parents[2]
    before = f"""
mount -t tmpfs mnt /mnt; mkdir /mnt/kept /mnt/root
mount --bind "{folder}" /mnt/kept; mount --bind "{root}" /mnt/root
for name in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o size=1m tmp "$name"; done
mkdir -p "{root}"; mount --bind /mnt/root "{root}"  # the checkout itself may be in /tmp
set -- /mnt/kept "$2" "$3" "$4" "$5" "$6"
"""
    found = outcomes(python, folder, ("packed", "packed for the node"), before=before)
    assert found["packed for the node"] == "1000000.0"  # in memory
    assert "CacheError" in found["packed"]
    for text in ("no room for a temporary file of 4.0 MB", "packed.pth unpacked", "/tmp: 1.0 MB free", "set TMPDIR"):
        assert text in found["packed"]


@pytest.mark.fault(83)
@pytest.mark.parametrize("tiny_shm", ["", "1"])
def test_dev_without_fd(folder, python, tiny_shm):
    found = outcomes(python, folder, ALL, before=BARE_DEV, env={"TINY_SHM": tiny_shm})
    assert found == dict.fromkeys(ALL, "1000000.0")


@pytest.mark.fault(83)
def test_neither_proc_nor_dev_fd(folder, python):
    """What is cached loads all the same; for the rest the error says what to mount."""
    before = f"{BARE_DEV}\nmount -t tmpfs none /proc"
    found = outcomes(python, folder, ("cached", "local", "packed"), before=before, env={"TINY_SHM": ""})
    for way in ("local", "packed"):
        assert found[way] == "1000000.0" or "mount /proc" in found[way], found
