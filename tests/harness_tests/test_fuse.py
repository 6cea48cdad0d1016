"""Mounts of the harness are filesystems, coherent where no vice is asked for, and are gone afterwards."""

import contextlib
import fcntl
import mmap
import os
import signal
from pathlib import Path

import pytest
from fuse_calls import errno_of, node_paths, opened

from harness import fuse
from harness.rank import mark
from harness.ranks import start_ranks
from harness.scripts import run_program, start_script
from harness.waiting import wait_until

PYTHONPATH = {"PYTHONPATH": str(Path(__file__).parent.parent)}
pytestmark = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))


def test_two_nodes_see_one_directory_at_once(tmp_path):
    with node_paths(tmp_path, 2) as (a, b):
        (a / "partial").write_bytes(b"1234")
        os.replace(a / "partial", a / "file")
        assert os.listdir(b) == ["file"]
        assert (b / "file").read_bytes() == b"1234"
        (a / "file").write_bytes(b"longer")
        assert ((b / "file").read_bytes(), (b / "file").stat().st_size) == (b"longer", 6)
        (a / "file").unlink()
        assert os.listdir(b) == [] and not (b / "file").exists()


def test_what_a_downloader_does(tmp_path):
    with node_paths(tmp_path) as [a], contextlib.ExitStack() as stack:
        path = a / "partial"
        descriptor = opened(stack, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        assert errno_of(os.open, path, os.O_CREAT | os.O_EXCL) == "EEXIST"
        os.posix_fallocate(descriptor, 0, 3 << 20)
        assert os.fstat(descriptor).st_size == 3 << 20
        content = os.urandom(2 << 20)
        assert os.pwrite(descriptor, content, 1000) == len(content)
        os.ftruncate(descriptor, 1000 + len(content))
        os.fdatasync(descriptor)
        os.fsync(descriptor)
        os.utime(path, ns=(10**18 + 1, 10**18 + 2))
        os.chmod(path, 0o640)
        os.chown(path, 12, 34)
        status = os.stat(path)
        assert (status.st_atime_ns, status.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 12, 34)
        os.rename(path, a / "file")
        assert os.pread(descriptor, 10, 1000) == content[:10]
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[1000:] == content
        with mmap.mmap(descriptor, 0) as mapped:
            mapped[:5] = b"first"
            mapped.flush()
        assert (tmp_path / "server" / "file").read_bytes() == b"first" + bytes(995) + content
        assert os.statvfs(a).f_bavail > 0


def test_names_of_every_kind(tmp_path):
    with node_paths(tmp_path) as [a]:
        os.makedirs(a / "one" / "two")
        (a / "one" / "file").write_bytes(b"x")
        os.link(a / "one" / "file", a / "linked")
        os.symlink("one/file", a / "symbolic")
        os.mkfifo(a / "pipe")
        assert os.stat(a / "linked").st_nlink == 2 and os.path.samefile(a / "linked", a / "one" / "file")
        assert os.readlink(a / "symbolic") == "one/file" and (a / "symbolic").read_bytes() == b"x"
        assert errno_of(os.open, a / "symbolic", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
        assert errno_of(os.rmdir, a / "one") == "ENOTEMPTY"
        assert (a / "pipe").is_fifo()
        for number in range(300):  # more than one request holds
            (a / "one" / "two" / f"{number:0100}").touch()
        assert len(os.listdir(a / "one" / "two")) == 300
        directory = os.open(a / "one", os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


@pytest.mark.parametrize("remove", ["unlink", "replace"])
@pytest.mark.parametrize("mount_of_removal", [0, 1])
def test_an_open_file_survives_its_name(tmp_path, remove, mount_of_removal):
    with node_paths(tmp_path, 2) as nodes, contextlib.ExitStack() as stack:
        path, other = nodes[0] / "file", nodes[mount_of_removal]
        path.write_bytes(b"old" * 5000)
        descriptor = opened(stack, path)
        mapped = stack.enter_context(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        if remove == "unlink":
            os.unlink(other / "file")
            assert os.listdir(nodes[0]) == []
        else:
            (other / "new").write_bytes(b"new" * 5000)
            os.replace(other / "new", other / "file")
            assert path.read_bytes() == b"new" * 5000
            assert path.stat().st_ino != os.fstat(descriptor).st_ino
        assert os.fstat(descriptor).st_nlink == 0
        assert os.pread(descriptor, 6, 0) == b"oldold" and mapped[-3:] == b"old"
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.pwrite(descriptor, b"OLD", 0)
        os.ftruncate(descriptor, 3)
        assert os.fstat(descriptor).st_size == 3 and os.pread(descriptor, 6, 0) == b"OLD"


def test_files_belong_to_who_made_them(tmp_path):
    with node_paths(tmp_path) as [a]:
        a.chmod(0o777)
        command = "umask 027; mkdir folder; echo text >file"
        words = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "sh", "-c", command]
        run_program(words, working_dir=a).check()
        owners = {name: (a / name).stat() for name in ("folder", "file")}
        assert {(status.st_uid, status.st_gid) for status in owners.values()} == {(1234, 1234)}
        assert [status.st_mode & 0o777 for status in owners.values()] == [0o750, 0o640]


def read_file(rank, path):
    mark("asks")
    try:
        return path.read_bytes()
    except OSError as error:
        return error.strerror


def test_a_stalled_server_makes_callers_wait(tmp_path):
    with fuse.nodes(tmp_path, 1) as [node]:
        (node.path / "file").write_bytes(b"content")
        with start_ranks(read_file, 1, env="none", args=(node.path / "file",)) as ranks:
            with node.stalled():
                ranks.wait_for_mark("asks")
                blocked = Path(f"/proc/{ranks.pids[0]}/wchan")
                wait_until(
                    lambda: "fuse" in blocked.read_text() or "request_wait" in blocked.read_text(), 10, "it waits"
                )
                assert ranks.is_alive(0)
            assert ranks.wait_for_end(0).value == b"content"


def test_a_killed_server_fails_callers(tmp_path):
    with fuse.nodes(tmp_path, 1) as [node]:
        (node.path / "file").write_bytes(b"content")
        file = os.open(node.path / "file", os.O_RDONLY)
        node.kill()
        assert {errno_of(os.stat, node.path), errno_of(os.fsync, file), errno_of(os.close, file)} == {"ENOTCONN"}
    assert os.listdir(node.path) == []


def test_it_goes_while_a_file_is_open(tmp_path):
    with node_paths(tmp_path) as [a]:
        descriptor = os.open(a / "file", os.O_CREAT | os.O_RDWR)
    assert os.listdir(a) == []
    assert {errno_of(os.fsync, descriptor), errno_of(os.close, descriptor)} == {"ENOTCONN"}


def test_it_goes_after_an_error_in_the_test(tmp_path):
    with pytest.raises(ZeroDivisionError), node_paths(tmp_path) as [a]:
        _ = 1 / 0
    assert not a.is_mount()


def test_it_goes_while_its_server_is_stalled(tmp_path):
    with contextlib.ExitStack() as stack:
        with fuse.nodes(tmp_path, 1) as [node]:
            stack.enter_context(node.stalled())
        assert not node.path.is_mount()


MOUNTED = """
import os, signal, sys
from pathlib import Path
from harness import fuse, mounts
mounts.isolate()
with fuse.nodes(Path(sys.argv[1]), 2) as nodes:
    print(*[node._program.pid for node in nodes], flush=True)
    signal.pause()
"""


def test_a_killed_test_process_leaves_neither_mount_nor_server(tmp_path):
    with start_script(MOUNTED, tmp_path, env={**PYTHONPATH, "TMPDIR": str(tmp_path)}) as script:
        wait_until(lambda: script.stdout or not script.is_alive, 20, "its nodes are mounted")
        servers = [Path("/proc", pid) for pid in script.stdout.split()]
        assert len(servers) == 2, script.stderr
        script.kill()
        assert script.wait().exitcode == -signal.SIGKILL
        wait_until(lambda: not any(server.exists() for server in servers), 10, "the servers end")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_a_misspelt_vice_is_an_error_at_once(tmp_path):
    for vices in {"lokcs": "pass"}, {"locks": "ENOLOK"}, {"errors": {"fsink": "EIO"}}, {"quota_at": "open"}:
        with pytest.raises((TypeError, AttributeError, KeyError, ValueError)), fuse.nodes(tmp_path, 1, **vices):
            pass


def test_an_error_of_the_filesystem_itself_fails_the_test(tmp_path):
    message = r"(?s)the filesystem had an error.*TypeError"
    with pytest.raises(AssertionError, match=message), node_paths(tmp_path, lag_seconds="many") as [a]:
        (tmp_path / "server" / "file").touch()
        assert errno_of(os.stat, a / "file") == "EIO"
