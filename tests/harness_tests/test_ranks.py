"""The ranks of tests are real, are all accounted for, and never outlive a test."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.rank import mark, mark_and_wait, pss_bytes, wait_for_gate
from harness.ranks import RankFailed, RanksTimedOut, agent_store, run_ranks, start_ranks, wait_until
from harness.scripts import descendants
from harness.spawner import process_state

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")


class OwnError(Exception):
    """An exception with a field, which must survive the way back."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code


def is_gone(pid):
    # A zombie is dead: it waits for a parent that is not ours to make fast.
    return process_state(pid) in ("", "Z (zombie)")


def sum_over_gloo(rank, factor, *, offset=0):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    tensor = torch.tensor([rank * factor + offset])
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    print(f"rank {rank} has {int(tensor)}")
    print("a line on stderr", file=sys.stderr)
    return int(tensor)


@pytest.mark.parametrize("env", ["torchrun", "env"])
def test_ranks_form_a_real_process_group(env):
    results = run_ranks(sum_over_gloo, 4, env=env, args=(10,), kwargs={"offset": 1})
    assert [result.value for result in results] == [64] * 4
    assert [result.stdout for result in results] == [f"rank {rank} has 64\n" for rank in range(4)]
    assert all("a line on stderr\n" in result.stderr for result in results)
    assert [result.exitcode for result in results] == [0] * 4
    assert len({result.pid for result in results} | {os.getpid()}) == 5


def report_environment(rank):
    return {name: os.environ[name] for name in LAUNCHER_NAMES if name in os.environ}


def test_variables_of_torchrun_on_two_nodes():
    values = [result.value for result in run_ranks(report_environment, 4, nodes=2)]
    assert [value["RANK"] for value in values] == ["0", "1", "2", "3"]
    assert [value["LOCAL_RANK"] for value in values] == ["0", "1", "0", "1"]
    assert [value["GROUP_RANK"] for value in values] == ["0", "0", "1", "1"]
    assert {value["LOCAL_WORLD_SIZE"] for value in values} == {"2"}
    assert {value["WORLD_SIZE"] for value in values} == {"4"}
    assert len({value["MASTER_PORT"] for value in values}) == 1


def test_nodes_of_unequal_size():
    values = [result.value for result in run_ranks(report_environment, 3, nodes=[1, 2])]
    assert [value["LOCAL_RANK"] for value in values] == ["0", "0", "1"]
    assert [value["LOCAL_WORLD_SIZE"] for value in values] == ["1", "2", "2"]


def test_no_launcher_means_no_variable(monkeypatch):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("SLURM_PROCID", "7")
    [result] = run_ranks(report_environment, 1, env="none")
    assert result.value == {}


def test_variables_of_single_ranks_win():
    results = run_ranks(report_environment, 2, rank_env={1: {"GROUP_RANK": "5", "LOCAL_RANK": None}})
    assert results[0].value["GROUP_RANK"] == "0"
    assert results[1].value["GROUP_RANK"] == "5"
    assert "LOCAL_RANK" not in results[1].value


def test_variables_from_a_function():
    results = run_ranks(report_environment, 2, env=lambda rank: {"RANK": f"{rank + 10}"})
    assert [result.value for result in results] == [{"RANK": "10"}, {"RANK": "11"}]


def fail_on_rank_1(rank):
    if rank == 1:
        raise OwnError(42)
    return "fine"


def test_an_exception_comes_back_with_its_fields():
    good, bad = run_ranks(fail_on_rank_1, 2, env="none")
    assert good.value == "fine"
    assert good.exception is None
    assert bad.exitcode == 1
    assert bad.exception.type_name == "OwnError"
    assert bad.exception.message == "42"
    assert bad.exception.original.code == 42
    assert "in fail_on_rank_1" in bad.exception.traceback
    assert "OwnError: 42" in bad.stderr
    with pytest.raises(RankFailed, match=r"rank 1 raised OwnError: 42(.|\n)*in fail_on_rank_1"):
        _ = bad.value


def return_a_lock(rank):
    return threading.Lock()


def test_a_value_that_cannot_travel_is_an_error_of_the_rank():
    [result] = run_ranks(return_a_lock, 1, env="none")
    assert "pickle" in result.exception.message


def exit_with(rank, code):
    sys.exit(code)


def test_an_exit_code_comes_back():
    [result] = run_ranks(exit_with, 1, env="none", args=(7,))
    assert (result.exitcode, result.exception) == (7, None)
    with pytest.raises(RankFailed, match="rank 0 ended with exit code 7"):
        _ = result.value


def hang_on_odd_ranks(rank):
    if rank % 2:
        print("before the hang", file=sys.stderr)
        wait_for_ever_in_c()
    return "done"


def wait_for_ever_in_c():
    read, _write = os.pipe()
    mark("hanging")
    os.read(read, 1)


def test_a_hung_rank_is_reported_with_its_stack_and_killed():
    with start_ranks(hang_on_odd_ranks, 4, env="none") as group:
        pids = group.pids
        group.wait_for_mark("hanging", ranks=[1, 3])
        for rank in (0, 2):
            group.wait_for_end(rank)
        with pytest.raises(RanksTimedOut) as caught:
            group.wait(0.2)
    message = str(caught.value)
    assert caught.value.hung_ranks == [1, 3]
    assert "2 of 4 ranks did not end within 0.2 s" in message
    assert "rank 0 returned" in message
    assert f"rank 1 (pid {pids[1]}) hangs" in message
    assert message.count("in wait_for_ever_in_c") == 2
    assert message.count("before the hang") == 2
    assert all(is_gone(pid) for pid in pids)


def hang_in_a_thread(rank):
    def linger():
        mark("lingering")
        threading.Event().wait()

    threading.Thread(target=linger).start()
    return "done"


def test_a_rank_that_returned_but_cannot_leave_is_reported():
    with start_ranks(hang_in_a_thread, 1, env="none") as group:
        group.wait_for_mark("lingering")
        with pytest.raises(RanksTimedOut, match=r"has returned but does not leave(.|\n)*in linger"):
            group.wait(1)


def hang(rank):
    mark("hanging")
    threading.Event().wait()


def test_a_stopped_rank_is_reported_as_stopped():
    with start_ranks(hang, 1, env="none") as group:
        group.wait_for_mark("hanging")
        group.stop(0)
        with pytest.raises(RanksTimedOut, match="stopped by a signal"):
            group.wait(0.1)


def test_a_killed_rank_ends_alone():
    with start_ranks(hang, 3, env="none") as group:
        group.wait_for_mark("hanging")
        group.kill(1)
        assert group.wait_for_end(1).exitcode == -signal.SIGKILL
        assert [group.is_alive(rank) for rank in range(3)] == [True, False, True]
        group.kill(0, signal.SIGTERM)
        assert group.wait_for_end(0).exitcode == -signal.SIGTERM
        pids = group.pids
    assert all(is_gone(pid) for pid in pids)


def test_a_mark_of_a_dead_rank_is_not_waited_for():
    expected = pytest.raises(RankFailed, match="no mark 'never': rank 0 ended with exit code 3")
    with start_ranks(exit_with, 1, env="none", args=(3,)) as group, expected:
        group.wait_for_mark("never", timeout_seconds=30)


def count_up(rank, path):
    mark("started", os.getpid())
    while not Path(path).exists():
        time.sleep(0.001)
    return "went on"


def test_a_frozen_rank_goes_on_when_told(tmp_path):
    with start_ranks(count_up, 1, env="none", args=(str(tmp_path / "go"),)) as group:
        assert group.wait_for_mark("started") == group.pids
        group.stop(0)
        (tmp_path / "go").touch()
        with pytest.raises(RankFailed, match="not ended within"):
            group.wait_for_end(0, timeout_seconds=0.2)
        group.cont(0)
        assert group.wait()[0].value == "went on"


def meet(rank):
    mark_and_wait("arrived", value=rank * rank)
    wait_for_gate("own")
    return time.monotonic()


def test_held_ranks_and_gates_are_the_tests_to_open():
    with start_ranks(meet, 3, env="none", held=[2]) as group:
        assert group.wait_for_mark("arrived", ranks=[0, 1]) == [0, 1]
        assert not group.is_alive(2)
        released = time.monotonic()
        group.release(2)
        assert group.wait_for_mark("arrived") == [0, 1, 4]
        group.open_gate("arrived")
        for rank in (2, 0, 1):
            group.open_gate("own", rank)
            group.wait_for_end(rank)
        results = group.wait()
    order = [results[2].value, results[0].value, results[1].value]
    assert order == sorted(order)
    assert results[2].started_at >= released
    assert results[0].marks == {"arrived": 0}


def start_a_daemon(rank):
    # Away from the rank's session, its process group and its life.
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return child.pid


def test_what_a_rank_leaves_behind_dies_with_it():
    [result] = run_ranks(start_a_daemon, 1, env="none")
    wait_until(lambda: is_gone(result.value), 10, "the daemon is reaped")


def test_ranks_die_with_the_test_process_however_it_dies(tmp_path):
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent)]!r}
import test_ranks
from harness.ranks import start_ranks, wait_until
from harness.scripts import start_program
program = start_program(["sh", "-c", "setsid sleep 1000 & wait"])
group = start_ranks(test_ranks.hang, 2)
group.wait_for_mark("hanging")
wait_until(lambda: program.children, 10, "a child in a session of its own")
print(*group.pids, *program.children, flush=True)
import time
time.sleep(1000)
"""
    # Not through our own zygote, which would kill the other one's processes first.
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as script:
        try:
            pids = [int(word) for word in script.stdout.readline().split()]
            assert len(pids) == 3
            everything = {*pids, *descendants(script.pid)}
            assert len(everything) >= 6  # its zygote, its store and a shell, besides
        finally:
            script.kill()
    wait_until(lambda: all(is_gone(pid) for pid in everything), 10, f"{everything} are gone")
    assert not list(tmp_path.glob("spawner-*"))


def use_store(rank, key):
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    return store.add(key, 1)


def test_a_store_can_outlive_jobs_and_die_before_them():
    with agent_store() as store:
        first = run_ranks(use_store, 2, store=store, args=("restarted",))
        second = run_ranks(use_store, 2, store=store, args=("restarted",))
        assert sorted(result.value for result in first + second) == [1, 2, 3, 4]
        store.kill()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", store.port)) != 0


def allocate(rank, size_bytes):
    mark_and_wait("before")
    ballast = os.urandom(1024) * (size_bytes // 1024)
    mark_and_wait("after", pss_bytes())
    return len(ballast)


def test_memory_is_counted_while_all_ranks_hold_it():
    size = 64 * 1024 * 1024
    with start_ranks(allocate, 2, env="none", args=(size,)) as group:
        group.wait_for_mark("before")
        before = group.pss_bytes()
        group.open_gate("before")
        own = group.wait_for_mark("after")
        after = group.pss_bytes()
        group.open_gate("after")
        results = group.wait()
    grown = [late - early for early, late in zip(before, after, strict=True)]
    assert all(abs(growth - size) < 0.1 * size for growth in grown), grown
    assert all(abs(ours - theirs) < 0.1 * size for ours, theirs in zip(own, after, strict=True))
    assert all(result.peak_rss_bytes > size for result in results)


def test_a_local_function_is_refused_with_the_reason():
    def local(rank):
        return rank

    with pytest.raises(TypeError, match="top of a module"):
        run_ranks(local, 1)


def report_cost(rank):
    return "torch" in sys.modules, time.process_time()


def test_a_rank_does_not_pay_for_the_import_of_torch():
    for result in run_ranks(report_cost, 4, env="none"):
        has_torch, cpu_seconds = result.value
        assert has_torch
        assert cpu_seconds < 0.3  # the import takes more than one second
