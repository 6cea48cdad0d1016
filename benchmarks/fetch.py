"""One process, one file: ``dist_fetch`` beside the programs and calls that people fetch with today.

Python's ways run in a process of their own that has imported everything, and only the call is timed; curl and aria2c
are timed from start to end of the program. What the seconds contain beyond the download stands in each row's note.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
from huggingface_hub import hf_hub_download

from benchmarks.bounds import Bound
from benchmarks.rounds import interleaved
from benchmarks.table import Table
from harness import nginx_behaviours as behaviours
from harness.checkpoints import CheckpointFile
from harness.hf import COMMIT
from harness.nginx import nginx
from harness.origin import Origin
from harness.ranks import run_ranks
from harness.replies import Reply

_REPOSITORY = "org/model"

LIMITED_BYTES_PER_SECOND = 20_000_000
LIMITED_SIZE_BYTES = 400_000_000


@dataclass(frozen=True)
class FetchWay:
    """One way to get a file.

    Attributes:
        note: What it does beside the download.
        seconds: What getting the file at a URL into a directory took.
    """

    name: str
    note: str
    seconds: Callable[[str, Path, CheckpointFile], float]


def curl(url: str, directory: Path, file: CheckpointFile) -> float:
    """``curl -o x && sync x``."""
    started = time.perf_counter()
    subprocess.run(["curl", "-sfo", directory / file.name, url], check=True)
    subprocess.run(["sync", directory / file.name], check=True)
    seconds = time.perf_counter() - started
    _check(directory, file)
    return seconds


def aria2c(*options: str) -> Callable[[str, Path, CheckpointFile], float]:
    """Eight connections, which aria2c is known for."""

    def seconds(url: str, directory: Path, file: CheckpointFile) -> float:
        command = ["aria2c", "--no-conf", "-q", "-x8", "-s8", "--file-allocation=falloc", *options]
        started = time.perf_counter()
        subprocess.run([*command, "-d", directory, "-o", file.name, url], check=True)
        taken = time.perf_counter() - started
        _check(directory, file)
        return taken

    return seconds


def sha256_in_memory(url: str, directory: Path, file: CheckpointFile) -> float:
    """The hash alone, of bytes that are there."""
    content = file.path.read_bytes()
    started = time.perf_counter()
    hashlib.sha256(content)
    return time.perf_counter() - started


def in_python(fetch: Callable[[str, Path, CheckpointFile], object]) -> Callable[[str, Path, CheckpointFile], float]:
    """Times a function in a fresh process."""

    def seconds(url: str, directory: Path, file: CheckpointFile) -> float:
        [result] = run_ranks(_timed, 1, 600, env="none", args=(fetch, url, directory, file))
        _check(directory, file)
        return float(result.value)

    return seconds


def _timed(
    rank: int,
    fetch: Callable[[str, Path, CheckpointFile], object],
    url: str,
    directory: Path,
    file: CheckpointFile,
) -> float:
    import rankload._api.state_dict  # noqa: F401 - the import is not part of the call

    started = time.perf_counter()
    fetch(url, directory, file)
    return time.perf_counter() - started


def rankload_fetch(url: str, directory: Path, file: CheckpointFile) -> object:
    """Ours."""
    from rankload import dist_fetch

    return dist_fetch(url, directory, check_hash=True, progress=False)


def torch_hub(url: str, directory: Path, file: CheckpointFile) -> object:
    """What load_state_dict_from_url does when the file is not cached."""
    return torch.hub.download_url_to_file(url, str(directory / file.name), file.sha256[:8], progress=False)


def requests_loop(url: str, directory: Path, file: CheckpointFile) -> object:
    """What people write by hand."""
    hasher = hashlib.sha256()
    partial = directory / f"{file.name}.part"
    with requests.get(url, stream=True, timeout=60) as response, partial.open("wb") as target:
        response.raise_for_status()
        for piece in response.iter_content(1 << 20):
            target.write(piece)
            hasher.update(piece)
    if hasher.hexdigest() != file.sha256:
        raise ValueError("wrong hash")
    return partial.rename(directory / file.name)


def huggingface_hub(url: str, directory: Path, file: CheckpointFile) -> float:
    """From a Hub of our own, which redirects to the URL, as the real one does to its CDN."""
    linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "X-Repo-Commit": COMMIT}
    with Origin() as hub:
        hub.add(f"{_REPOSITORY}/resolve/main/{file.name}", b"", Reply(redirect_to=url, headers=linked))
        return in_python(_hf_hub_download)(hub.base_url, directory, file)


def _hf_hub_download(endpoint: str, directory: Path, file: CheckpointFile) -> object:
    return hf_hub_download(_REPOSITORY, file.name, endpoint=endpoint, local_dir=directory, token=False)


CURL = FetchWay("curl -o x && sync x", "not verified; synced", curl)
RANKLOAD = FetchWay("rankload.dist_fetch", "verified, published, synced", in_python(rankload_fetch))
TORCH_HUB = FetchWay("torch.hub.download_url_to_file", "verified; not synced", in_python(torch_hub))
REQUESTS = FetchWay("requests loop with hashlib", "verified; not synced", in_python(requests_loop))
HUB = FetchWay("huggingface_hub.hf_hub_download", "not verified; not synced", huggingface_hub)
ARIA2C = FetchWay("aria2c -x8 -s8", "not verified; not synced", aria2c())
ARIA2C_1M = FetchWay("aria2c -x8 -s8 -k1M", "not verified; not synced", aria2c("-k1M"))
SHA256 = FetchWay("SHA-256 of bytes in memory", "the floor of what verifies on one core", sha256_in_memory)


def fetch(file: CheckpointFile, limited_file: CheckpointFile, rounds: int, scratch: Path) -> Iterator[Table]:
    """Yield both tables: at full speed, and from an origin that limits each connection."""
    with nginx(file.path.parent) as server:
        ways = [CURL, RANKLOAD, TORCH_HUB, HUB, REQUESTS, SHA256]
        yield Table(
            "fetch",
            f"fetch, {file.size / 1e9:.2f} GB, nginx on loopback, medians of {rounds}",
            _compare(ways, server.url(file.name), file, rounds, scratch),
            {way.name: way.note for way in ways},
            (
                Bound(RANKLOAD.name, SHA256.name),
                Bound(RANKLOAD.name, CURL.name, at_most=1.2),
                Bound(RANKLOAD.name, TORCH_HUB.name, at_most=0.6),
            ),
        )
    with nginx(limited_file.path.parent, behaviours.rate(LIMITED_BYTES_PER_SECOND)) as server:
        limit = f"{LIMITED_BYTES_PER_SECOND / 1e6:.0f} MB/s per connection"
        ways = [CURL, RANKLOAD, ARIA2C, ARIA2C_1M]
        yield Table(
            "fetch-limited",
            f"fetch, {limited_file.size / 1e9:.2f} GB, nginx limited to {limit}, medians of {rounds}",
            _compare(ways, server.url(limited_file.name), limited_file, rounds, scratch),
            {way.name: way.note for way in ways},
            [Bound(way.name, RANKLOAD.name, at_least=0.95) for way in (ARIA2C, ARIA2C_1M)],
        )


def _compare(
    ways: Sequence[FetchWay], url: str, file: CheckpointFile, rounds: int, scratch: Path
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in interleaved(ways, rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            os.sync()  # or this way would wait for what the one before it has written
            seconds[way.name].append(way.seconds(url, Path(directory), file))
    return seconds


def _check(directory: Path, file: CheckpointFile) -> None:
    size = (directory / file.name).stat().st_size
    if size != file.size:
        raise RuntimeError(f"{size} of {file.size} bytes of {file.name} were fetched")
