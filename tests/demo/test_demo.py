"""The demo as people run it: demo.sh, its output, its exit status, and what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from demo.fingerprint import fingerprint
from demo.job import Job, run_job
from demo.origin import Origin, Served
from demo.outcome import JobFailed

# Ten processes import torch for each run: generous, for machines that do other things too.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "launch" / "demo.sh")

# Slow enough for the 2 MB checkpoint that every rank has asked before the first one has the file.
SLOW_BYTES_PER_SECOND = 1e6

ROW = re.compile(r"^  (\d+) +(downloads|waits|reads the file) +(\S+) +([\d.]+) s +(-?[\d,.]+) MB$", re.M)
TOTALS = re.compile(
    r"origin served (\d+) requests?, ([\d,.]+) MB \| slowest rank ([\d.]+) s \| all ranks hold ([\d,.]+) MB"
)


@pytest.fixture
def environment(tmp_path):
    """A demo that uses this interpreter and leaves its caches where the test can look."""
    return {**os.environ, "RANKLOAD_PYTHON": sys.executable, "TMPDIR": str(tmp_path)}


@pytest.fixture
def run_demo(environment):
    def run(*arguments):
        command = [DEMO, *arguments]
        return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)

    return run


def number(text):
    return float(text.replace(",", ""))


@pytest.mark.slow
def test_shows_what_both_ways_cost(run_demo, tmp_path, weights):
    finished = run_demo()
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert finished.stderr == ""
    output = finished.stdout
    assert all(len(line) <= 100 for line in output.splitlines()), output
    assert "limited to 125 MB/s in total" in output
    file_megabytes = round(weights("full").stat().st_size / 1e6, 1)
    assert file_megabytes == 89.0

    hub_part, _, rankload_part = output.partition("rankload.dist_load_state_dict_from_url on every rank")
    ways = []
    for part, requests, downloading in ((hub_part, 4, {0, 1, 2, 3}), (rankload_part, 1, {0})):
        rows = ROW.findall(part)
        assert [int(row[0]) for row in rows] == [0, 1, 2, 3]
        assert {int(row[0]) for row in rows if row[1] == "downloads"} == downloading
        [totals] = TOTALS.findall(part)
        assert int(totals[0]) == requests
        assert number(totals[1]) == pytest.approx(requests * file_megabytes, abs=0.1)
        assert number(totals[2]) == max(number(row[3]) for row in rows)
        assert number(totals[3]) == pytest.approx(sum(number(row[4]) for row in rows), abs=0.5)
        ways.append(totals)
    hub, rankload = ways
    # The rate alone makes 4 files take 2.8 s and one 0.7 s.
    assert number(hub[2]) >= 2.7
    assert number(rankload[2]) < number(hub[2])
    if Path("/proc/self/smaps_rollup").exists():
        assert number(hub[3]) > 3.8 * file_megabytes
        assert number(rankload[3]) < 1.5 * file_megabytes

    assert re.search(r"requests to the origin +4 +1 +4\.0x less", output)
    assert re.search(r"served by the origin +356\.0 MB +89\.0 MB +4\.0x less", output)
    assert "All ranks agree in both ways" in output
    assert "a 440 Hz tone is heard at 442 Hz" in output
    assert "the same parameters after one DDP step" in output
    assert list(tmp_path.iterdir()) == [], "the demo left caches behind"


@pytest.mark.slow
def test_a_url_of_the_users_own(run_demo, weights):
    path = weights("tiny")
    with Origin(path, SLOW_BYTES_PER_SECOND) as origin:
        finished = run_demo(origin.url, "--ranks", "2", "--check-hash")
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert path.name in finished.stdout
    assert "origin" not in finished.stdout
    assert re.search(r"ranks that download +2 +1 +2\.0x less", finished.stdout)
    assert "All ranks agree in both ways" in finished.stdout
    assert origin.served == Served(3, 3 * path.stat().st_size)


def test_a_nested_training_checkpoint(tmp_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "epoch.pt"
    content = {
        "model": {"weight": torch.arange(300_000.0).reshape(500, 600).t(), "step": torch.tensor(7)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(10, dtype=torch.bfloat16)}}, "groups": [{"lr": 0.1}]},
        "empty": torch.empty(0),
        "epoch": 3,
    }
    torch.save(content, path)
    with Origin(path) as origin:
        reports = run_job(Job("rankload", origin.url, 2, None, check_hash=False), tmp_path)
    assert {report.fingerprint for report in reports} == {fingerprint(content)}


@pytest.mark.slow
def test_what_torch_hub_cannot_load_still_shows_rankload(run_demo, weights):
    finished = run_demo(str(weights("tiny")), "--ranks", "2")
    assert finished.returncode == 0, finished.stderr + finished.stdout
    hub_part, _, rankload_part = finished.stdout.partition("rankload.dist_load")
    assert ROW.findall(hub_part) == []
    assert "unknown url type" in hub_part
    assert {row[1] for row in ROW.findall(rankload_part)} == {"reads the file"}
    assert "All ranks agree (rankload only)" in finished.stdout


@pytest.mark.slow
def test_a_url_that_does_not_exist_fails_with_its_cause(run_demo, tmp_path, weights):
    with Origin(weights("tiny")) as origin:
        finished = run_demo(origin.url.replace("crepe", "other"), "--ranks", "2")
    assert finished.returncode == 1
    assert "demo: the job failed." in finished.stderr
    assert "404" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checkpoint_fails_the_job_and_names_the_ranks(tmp_path, weights, tmp_path_factory):
    wrong = tmp_path_factory.mktemp("served") / weights("tiny").name
    torch.save({"weight": torch.ones(3)}, wrong)
    with Origin(wrong) as origin, pytest.raises(JobFailed, match=r"(?s)rank.*invalid hash value"):
        run_job(Job("torch.hub", origin.url, 2, "tiny", check_hash=True), tmp_path)


def test_ranks_that_disagree_all_fail_and_say_who_has_what(tmp_path):
    script = tmp_path / "disagree.py"
    script.write_text(
        "import sys\n"
        "import torch.distributed as dist\n"
        "from demo.rank import RanksDisagree, agreed\n"
        "dist.init_process_group('gloo')\n"
        "assert agreed('the weather', 'rain') == 'rain'\n"
        "try:\n"
        "    agreed('the weights', '0676ba61' if dist.get_rank() != 1 else 'deadbeef')\n"
        "except RanksDisagree as error:\n"
        "    sys.stdout.write(f'{error}\\n')  # one write: ranks share the pipe\n"
        "    sys.stdout.flush()\n"
        "    dist.barrier()\n"
        "    sys.exit(7)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "launch")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode != 0
    message = "the ranks disagree on the weights (rank 0, 2: 0676ba61; rank 1: deadbeef)"
    assert sorted(finished.stdout.splitlines()) == [message] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_the_job_and_removes_its_files(number, environment, tmp_path):
    command = [DEMO, "--capacity", "tiny", "--rate", "0.1", "--ranks", "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: list(tmp_path.glob("rankload-demo-*/torch-home/hub/checkpoints/*.partial")))
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert commands_naming(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--rate", "-1"], ["--capacity", "huge"], ["a", "b"]])
def test_wrong_arguments_are_refused_with_the_usage(run_demo, arguments):
    finished = run_demo(*arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("usage: demo.sh")


def wait_until(condition, timeout_seconds=60.0):
    deadline = time.monotonic() + timeout_seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        pause.wait(0.05)


def commands_naming(path):
    """The command lines of all living processes that mention the path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if str(path) in command:
            found.append(command)
    return found
