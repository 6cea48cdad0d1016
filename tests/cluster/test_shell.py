"""Shell that users copy has no mistakes that shellcheck knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.lab import REPOSITORY


def test_shell_files_pass_shellcheck() -> None:
    folders = (".ci", "launch", "slurm", "tests")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*") if is_shell(file)]
    assert {"single_node.sh", "multi_node.sh", "train_srun.sbatch"} <= {file.name for file in files}

    checked = subprocess.run(["shellcheck", *files], check=False, capture_output=True, text=True, timeout=60)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def is_shell(file: Path) -> bool:
    return file.suffix in (".sh", ".sbatch") and file.is_file()
