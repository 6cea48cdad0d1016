"""Programs on a deadline, and the real torchrun."""

import json
import signal
import sys
from pathlib import Path

import pytest

from harness.environments import places, torchrun_variables
from harness.ranks import wait_until
from harness.scripts import ProgramTimedOut, run_program, run_script, run_torchrun, start_program, start_script


def test_a_script_gets_words_and_variables(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, sys; print(sys.argv[1:], os.environ.get('COLOUR'), os.environ.get('HOME'))")
    result = run_script(path, "one", "two words", env={"COLOUR": "red", "HOME": None})
    assert result.check().stdout == "['one', 'two words'] red None\n"


def test_code_runs_in_a_fresh_interpreter():
    result = run_script("import sys; print('torch' in sys.modules); sys.exit(3)")
    assert (result.exitcode, result.stdout) == (3, "False\n")
    with pytest.raises(AssertionError, match="exit code 3"):
        result.check()


def test_a_missing_command_says_so():
    result = run_program(["no-such-command-here"])
    assert result.exitcode == 127
    assert "cannot run no-such-command-here" in result.stderr


def test_a_broken_pipe_ends_a_shell_as_it_should():
    # Python ignores SIGPIPE; a shell that inherited that would print an error instead.
    assert run_program(["sh", "-c", "yes | head -n1; echo done"]).stderr == ""


def test_a_hung_script_is_reported_with_its_stack():
    code = "import os\ndef stuck():\n  os.read(os.pipe()[0], 1)\nprint('before', flush=True)\nstuck()\n"
    with start_script(code) as script:
        pid = script.pid
        wait_until(lambda: script.stdout, 20, "the script runs")
        with pytest.raises(ProgramTimedOut, match=r"before\n(.|\n)*in stuck"):
            script.wait(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_children_of_a_killed_program_die_in_whatever_session():
    with start_program(["sh", "-c", "setsid sleep 1000 & setsid sleep 1000 & wait"]) as program:
        wait_until(lambda: len(program.children) == 2, 10, "two children")
        children = program.children
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10, f"{children} are gone")


def test_a_signal_reaches_a_program():
    with start_program(["sh", "-c", "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.01; done"]) as it:
        wait_until(lambda: it.stdout == "ready\n", 10, "the trap is set")
        it.kill(signal.SIGUSR1)
        result = it.wait(10)
    assert (result.exitcode, result.stdout) == (5, "ready\ncaught\n")


JOB = """
import os, sys
import torch.distributed as dist
# Through the agent's store, without gloo: that may fail to connect over a store that holds an earlier attempt's keys.
store, rank, size = next(dist.rendezvous("env://"))
print(f"rank {rank} of {size}, attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
store.set(f"{os.environ['TORCHELASTIC_RESTART_COUNT']}/{rank}", "here")
store.wait([f"{os.environ['TORCHELASTIC_RESTART_COUNT']}/{other}" for other in range(size)])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(9)
"""


def test_the_real_torchrun_and_its_restart(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    result = run_torchrun(path, 2, options=["--standalone", "--max-restarts=1"]).check()
    assert {place: stdout for place, (stdout, _) in result.worker_streams.items()} == {
        (attempt, rank): f"rank {rank} of 2, attempt {attempt}\n" for attempt in range(2) for rank in range(2)
    }


def test_our_variables_are_those_of_torchrun(tmp_path):
    path = tmp_path / "variables.py"
    path.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    result = run_torchrun(path, 2).check()
    ours = torchrun_variables(places(2, 1)[1], port=1)
    theirs = json.loads(result.worker_streams[0, 1][0])
    differing = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    assert set(ours) <= set(theirs)
    for name in set(ours) - differing:
        assert (name, ours[name]) == (name, theirs[name])
    unknown = {name for name in theirs if name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_", "MASTER_"))} - set(ours)
    assert unknown <= {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}, unknown


def test_output_of_python_is_seen_while_it_runs():
    with start_script("print('early', flush=True); import time; time.sleep(1000)") as script:
        wait_until(lambda: script.stdout == "early\n", 20, "the first line")
        assert script.is_alive
        assert sys.executable in Path(f"/proc/{script.pid}/cmdline").read_text()
