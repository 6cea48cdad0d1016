"""Files of the Hub in huggingface_hub's own cache: each finds what the other has put there."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import rankload
from harness import hf
from harness.origin import Origin
from harness.ranks import RankResult, run_ranks
from harness.replies import Reply
from harness.scripts import run_script
from rankload._fetch.hub_cache import fetch_into_hub_cache
from rankload._fetch.hub_names import HubFile
from rankload._fetch.request import make_request
from rankload._settings import Settings

STATE_DICT = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
WEIGHTS = save(STATE_DICT)
NEWER = save({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})


@dataclass
class Hub:
    """A Hub with ``org/one`` (a safetensors file) and ``org/two`` (two of them and their index)."""

    origin: Origin
    cdn: Origin
    one: hf.Repository
    two: hf.Repository
    home: Path
    environment: dict[str, str]

    def directory(self, name: str) -> Path:
        """Where huggingface_hub's cache has a repository."""
        return self.home / "hub" / f"models--org--{name}"

    def blob(self, name: str, content: bytes) -> Path:
        return self.directory(name) / "blobs" / hashlib.sha256(content).hexdigest()

    def run(self, function, *args: object, ranks: int = 1, **variables: str) -> list[RankResult]:
        """Call a function in processes of their own, which read the variables as they import huggingface_hub."""
        environment = {**self.environment, **variables}
        return run_ranks(function, ranks, args=args, rank_env=dict.fromkeys(range(ranks), environment))

    def client(self, code: str) -> list[str]:
        """Run huggingface_hub itself, and return what it prints."""
        return run_script(f"from huggingface_hub import *\n{code}", env=self.environment).check().stdout.splitlines()


@pytest.fixture
def hub(origin: Origin, tmp_path: Path) -> Iterator[Hub]:
    with Origin() as cdn:
        one = hf.publish(origin, "org/one", {"config.json": b"{}", "model.safetensors": WEIGHTS}, cdn=cdn)
        parts = {f"model-0000{n}-of-00002.safetensors": save({k: v}) for n, (k, v) in enumerate(STATE_DICT.items(), 1)}
        index = {"metadata": {}, "weight_map": dict(zip(STATE_DICT, parts, strict=True))}
        files = {**parts, "model.safetensors.index.json": json.dumps(index).encode()}
        two = hf.publish(origin, "org/two", files, cdn=cdn)
        home = tmp_path / "hf"
        variables = {name: value for name, value in one.environment.items() if value is not None}
        variables |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "TORCH_HOME": str(tmp_path / "torch")}
        yield Hub(origin, cdn, one, two, home, variables)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("hf://org/name/model.safetensors", HubFile("org/name", None, "model.safetensors")),
        ("hf://org/name@v1/unet/a%20b.bin", HubFile("org/name", "v1", "unet/a b.bin")),
        ("hf://org/name@refs/pr/3/x.bin", HubFile("org/name", "refs/pr/3", "x.bin")),
        ("hf://org/name@refs%2Fpr%2F3/x.bin", HubFile("org/name", "refs/pr/3", "x.bin")),
        ("hf://org/name", None),
        ("hf://datasets/org/name/x.bin", None),
        ("hf://org/name/../x.bin", None),
        ("hf://org/name/%2E%2E/x.bin", None),
        ("hf://org/name@..%2F..%2Fx/x.bin", None),
        ("https://org/name/x.bin", None),
    ],
)
def test_which_urls_name_a_file_of_the_hub(url: str, file: HubFile | None) -> None:
    assert HubFile.parse(url) == file
    assert file is None or HubFile.parse(file.url) == file


def load(rank: int, url: str, **arguments: object) -> list[float] | str:
    try:
        return rankload.dist_load_state_dict_from_url(url, **arguments)["weight"].flatten().tolist()
    except rankload.RankloadError as error:
        return f"{type(error).__name__}: {error}"


WEIGHT = STATE_DICT["weight"].flatten().tolist()


def test_nodes_with_caches_of_their_own_get_each_file_once(hub: Hub, tmp_path: Path) -> None:
    homes = [tmp_path / f"node{rank}" for rank in range(2)]
    variables = {rank: {**hub.environment, "HF_HOME": str(home)} for rank, home in enumerate(homes)}
    results = run_ranks(load, 2, nodes=2, args=("hf://org/two",), rank_env=variables)
    assert [result.value for result in results] == [WEIGHT] * 2
    parts = [save({name: value}) for name, value in STATE_DICT.items()]
    questions = len(homes) * len(parts)  # each node asks for a byte of each part
    assert sum(map(len, parts)) <= hub.cdn.bytes_sent() <= sum(map(len, parts)) + questions
    for home in homes:
        blobs = home / "hub" / "models--org--two" / "blobs"
        assert {hashlib.sha256(part).hexdigest() for part in parts} <= {path.name for path in blobs.iterdir()}


def load_unlike_the_others(rank: int, argument: str, value: object) -> object:
    return load(rank, "hf://org/one", **({argument: value} if rank == 1 else {}))


@pytest.mark.parametrize(("argument", "value"), [("check_hash", True), ("file_name", "mine.safetensors")])
def test_ranks_that_want_the_weights_in_different_ways(hub: Hub, argument: str, value: object) -> None:
    texts = [result.value for result in hub.run(load_unlike_the_others, argument, value, ranks=2)]
    assert all(text.startswith("ArgumentMismatchError: ") and argument in text for text in texts), texts


#: Of a rank that reaches no Hub.
NO_HUB = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "RANKLOAD_RETRIES": "0"}


def run_on_nodes(function, hub: Hub, homes: list[Path], *args: object, offline: int | None = None) -> list[object]:
    """Call a function on nodes with caches of their own, of which one may reach no Hub."""
    variables = {rank: {**hub.environment, "HF_HOME": str(home)} for rank, home in enumerate(homes)}
    if offline is not None:
        variables[offline] |= NO_HUB
    return [result.value for result in run_ranks(function, len(homes), nodes=len(homes), args=args, rank_env=variables)]


def fetch(rank: int, url: str, **arguments: object) -> str:
    try:
        return rankload.dist_fetch(url, **arguments).read_text()
    except rankload.RankloadError as error:
        return f"{type(error).__name__}: {error}"


def commits_asked_for(hub: Hub) -> list[str]:
    return [request.path for request in hub.origin.requests() if "/api/models/" in request.path]


def test_one_node_asks_the_hub_for_all(hub: Hub, tmp_path: Path) -> None:
    homes = [tmp_path / f"node{rank}" for rank in range(3)]
    for url in ("hf://org/two", "hf://org/one/model.safetensors"):
        assert run_on_nodes(load, hub, homes, url) == [WEIGHT] * 3
    assert len(commits_asked_for(hub)) == 2
    assert {(home / "hub/models--org--two/refs/main").read_text() for home in homes} == {hf.COMMIT}
    assert run_on_nodes(load, hub, homes, "hf://org/one/model.safetensors") == [WEIGHT] * 3
    assert len(commits_asked_for(hub)) == 2


@pytest.mark.fault(94)
@pytest.mark.parametrize("offline", [0, 1])
def test_node_that_reaches_no_hub(hub: Hub, tmp_path: Path, offline: int) -> None:
    """It learns commit and digest from another node, and gets the content from there: of small files, too."""
    homes = [tmp_path / f"node{rank}" for rank in range(2)]
    for _ in range(2):
        assert run_on_nodes(fetch, hub, homes, "hf://org/one/config.json", offline=offline) == ["{}"] * 2
        found = run_on_nodes(load, hub, homes, "hf://org/one/model.safetensors", offline=offline)
        assert found == [WEIGHT] * 2
    assert len(commits_asked_for(hub)) == 2
    linked = homes[offline] / f"hub/models--org--one/snapshots/{hf.COMMIT}/config.json"
    assert linked.is_symlink() and linked.resolve().name == hashlib.sha1(b"blob 2\0{}").hexdigest()


@pytest.mark.parametrize("has_it", [0, 1])
def test_node_that_has_the_file_tells_the_commit_in_offline_mode(hub: Hub, tmp_path: Path, has_it: int) -> None:
    homes = [tmp_path / f"node{rank}" for rank in range(2)]
    for function, url in ((load, "hf://org/one/model.safetensors"), (fetch, "hf://org/one/config.json")):
        [expected] = run_on_nodes(function, hub, homes[has_it : has_it + 1], url)
        before = len(hub.origin.requests())
        assert run_on_nodes(offline_call, hub, homes, function, url) == [expected] * 2
        assert len(hub.origin.requests()) == before


def offline_call(rank: int, function, url: str) -> object:
    return function(rank, url, offline=True)


@pytest.mark.parametrize("status", [429, 404])
def test_hub_that_is_busy_or_says_no_is_not_asked_by_all_nodes(hub: Hub, tmp_path: Path, status: int) -> None:
    homes, name = [tmp_path / f"node{rank}" for rank in range(3)], "api/models/org/one"
    with urllib.request.urlopen(hub.origin.url(name)) as response:
        listing = response.read()
    hub.origin.add(name, listing, Reply(status=status), Reply(status=status if status == 404 else 200))
    found = run_on_nodes(load, hub, homes, "hf://org/one/model.safetensors")
    if status == 429:
        assert found == [WEIGHT] * 3
    else:
        assert all(str(text).startswith("HTTPStatusError: HTTP Error 404: hf://org/one") for text in found), found
    assert len(commits_asked_for(hub)) == 3  # one is the test's own


def test_no_node_reaches_the_hub(hub: Hub, tmp_path: Path) -> None:
    homes = [tmp_path / f"node{rank}" for rank in range(2)]
    hub.environment |= NO_HUB
    for function, url in ((load, "hf://org/one/model.safetensors"), (load, "hf://org/two")):
        for text in run_on_nodes(function, hub, homes, url):
            assert str(text).startswith(f"NetworkError: {url.removesuffix('/model.safetensors')}: "), text
    for text in run_on_nodes(offline_call, hub, homes, load, "hf://org/one/model.safetensors"):
        assert str(text).startswith("OfflineError: "), text


class ShareThatSays:
    """Another node's answer."""

    def __init__(self, **answer: str | None) -> None:
        self.answer = answer

    def first_answer(self, ask: object) -> dict[str, str | None]:
        return self.answer


@pytest.mark.parametrize(
    ("commit", "blob"), [("../../..", None), (hf.COMMIT, "../../../refs/main"), (hf.COMMIT, "a" * 40 + "/x"), ("", "")]
)
def test_answer_of_another_node_that_would_lead_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str, blob: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    request = make_request("hf://org/one/config.json", None, Settings())
    share: Any = ShareThatSays(commit=commit, blob=blob, sha256=None)
    with pytest.raises(rankload.errors.CoordinationError, match=r"hf://org/one/config.json: a rank says"):
        fetch_into_hub_cache(request, lambda progress: None, Settings(), pytest.fail, share)
    assert list(tmp_path.iterdir()) == []


def test_the_client_finds_what_rankload_has_fetched(hub: Hub) -> None:
    for url in ("hf://org/two", "hf://org/one/model.safetensors"):
        assert [result.value for result in hub.run(load, url, ranks=3)] == [WEIGHT] * 3
    assert len(hub.cdn.requests()) == 3  # the two parts, and the one file
    before = len(hub.origin.requests())
    lines = hub.client(
        "print(hf_hub_download('org/one', 'model.safetensors', local_files_only=True))\n"
        "print(snapshot_download('org/two', local_files_only=True))\n"
        "found = scan_cache_dir(); print(len(found.warnings), sorted(repo.repo_id for repo in found.repos))\n"
        "print(sorted(len(revision.files) for repo in found.repos for revision in repo.revisions))\n"
        "print({ref for repo in found.repos for ref in repo.refs})\n"
    )
    snapshot = hub.directory("two") / "snapshots" / hf.COMMIT
    assert lines == [
        str(hub.directory("one") / "snapshots" / hf.COMMIT / "model.safetensors"),
        str(snapshot),
        "0 ['org/one', 'org/two']",
        "[1, 3]",
        "{'main'}",
    ]
    assert not [request.path for request in hub.origin.requests()[before:] if "org/" in request.path]
    for path in snapshot.iterdir():
        assert path.is_symlink() and path.read_bytes() == hub.two.files[path.name]


def mapped(rank: int, url: str) -> tuple[list[float], bool]:
    weight = rankload.dist_load_state_dict_from_url(url)["weight"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return weight.flatten().tolist(), any("/blobs/" in line for line in maps)


@pytest.mark.parametrize("url", ["hf://org/two", "hf://org/one", "hf://org/one/model.safetensors"])
def test_rankload_finds_what_the_client_has_fetched(hub: Hub, url: str) -> None:
    hub.client("snapshot_download('org/one'); snapshot_download('org/two')")
    before = len(hub.origin.requests()) + len(hub.cdn.requests())
    results = hub.run(mapped, url, ranks=2, HF_HUB_OFFLINE="1")
    assert [result.value for result in results] == [(WEIGHT, True)] * 2  # mapped: nobody rewrites a blob
    assert len(hub.origin.requests()) + len(hub.cdn.requests()) == before


def test_a_part_that_is_missing_is_fetched(hub: Hub) -> None:
    hub.client("hf_hub_download('org/two', 'model.safetensors.index.json')")
    assert hub.run(load, "hf://org/two")[0].value == WEIGHT
    assert len(hub.cdn.requests()) == 2


def test_offline_without_the_file(hub: Hub) -> None:
    [result] = hub.run(load, "hf://org/one/model.safetensors", RANKLOAD_OFFLINE="1")
    assert result.value.startswith("OfflineError") and "prefetch hf://org/one/model.safetensors" in result.value
    assert not hub.origin.requests()


def test_damaged_blob_is_not_used_and_stays_the_clients(hub: Hub) -> None:
    hub.client("snapshot_download('org/one')")
    damaged = hub.blob("one", WEIGHTS)
    content = bytearray(WEIGHTS)
    content[-1] ^= 1
    damaged.write_bytes(content)
    [result] = hub.run(load, "hf://org/one/model.safetensors")
    assert result.value == WEIGHT and "invalid hash value" in result.stderr
    assert damaged.read_bytes() == content


def test_damaged_index_is_named(hub: Hub) -> None:
    hub.client("snapshot_download('org/two')")
    index = hub.directory("two") / "snapshots" / hf.COMMIT / "model.safetensors.index.json"
    index.resolve().write_bytes(b"{}")
    [result] = hub.run(load, "hf://org/two")
    assert result.value.startswith("VerificationError") and str(index.resolve()) in result.value


def test_wrong_bytes_are_never_published(hub: Hub) -> None:
    hub.cdn.add(hub.one.blob("model.safetensors"), WEIGHTS, flip_byte_at=len(WEIGHTS) - 1)
    index = "model.safetensors.index.json"
    hub.origin.add(hub.two.resolved(index, hf.COMMIT), b'{"weight_map": {}}')
    for url in ("hf://org/one", "hf://org/two"):
        [result] = hub.run(load, url)
        assert "Digest" in result.value or "VerificationError" in result.value, result.value
    assert not list(hub.home.glob("hub/models--*/snapshots/*/*"))
    assert not hub.blob("one", WEIGHTS).exists()
    assert not [path for path in hub.directory("two").glob("blobs/*") if path.is_file()]


def test_branch_that_moves_is_followed_on_request_only(hub: Hub) -> None:
    url = "hf://org/one/model.safetensors"
    assert hub.run(load, url)[0].value == WEIGHT
    newer = "89abcdef" * 5
    hf.publish(hub.origin, "org/one", {"model.safetensors": NEWER}, cdn=hub.cdn, commit=newer)
    assert hub.run(load, url)[0].value == WEIGHT
    assert hub.run(load_refreshed, url, ranks=2)[0].value == [0.0] * 6
    assert hub.client("print(hf_hub_download('org/one', 'model.safetensors', local_files_only=True))") == [
        str(hub.directory("one") / "snapshots" / newer / "model.safetensors")
    ]
    assert hub.run(load, f"hf://org/one@{hf.COMMIT}/model.safetensors")[0].value == WEIGHT


def load_refreshed(rank: int, url: str) -> object:
    return load(rank, url, refresh=True)


def test_hub_that_cannot_be_reached_after_an_earlier_call(hub: Hub) -> None:
    assert hub.run(load, "hf://org/two")[0].value == WEIGHT
    [result] = hub.run(load, "hf://org/two", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.value == WEIGHT and "using what an earlier call has found" in result.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "HF_TOKEN"), (403, "conditions"), (404, "no such repository or revision"), (503, "503")],
)
def test_what_the_hub_refuses(hub: Hub, status: int, words: str) -> None:
    hub.origin.add(f"api/models/org/one/revision/{hf.COMMIT}", b"{}", status=status)
    hub.origin.add("api/models/org/one", b"{}", status=status)
    for url in ("hf://org/one", f"hf://org/one@{hf.COMMIT}/model.safetensors"):
        before = len(hub.origin.requests())
        [result] = hub.run(load, url, RANKLOAD_RETRIES="2", RANKLOAD_BACKOFF_SECONDS="0.01")
        assert result.value.startswith(f"HTTPStatusError: HTTP Error {status}: hf://org/one") and words in result.value
        assert len(hub.origin.requests()) - before == (3 if status == 503 else 1)  # only a failure is tried again


def test_file_that_the_repository_lacks(hub: Hub) -> None:
    [result] = hub.run(load, "hf://org/one/model.pth")
    words = f"hf://org/one/model.pth: the repository has no such file at commit {hf.COMMIT}"
    assert result.value.startswith(f"FetchError: {words}")


def test_proxy_that_lists_names_alone(hub: Hub) -> None:
    hf.publish(hub.origin, "org/two", hub.two.files, cdn=hub.cdn, is_described=False)
    assert hub.run(load, "hf://org/two")[0].value == WEIGHT
    [path] = hub.client("print(snapshot_download('org/two', local_files_only=True))")
    assert {file.name for file in Path(path).iterdir()} == set(hub.two.files)


def test_a_directory_that_is_chosen_is_kept_to(hub: Hub, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    assert hub.run(load, "hf://org/one", RANKLOAD_MODEL_DIR=str(chosen))[0].value == WEIGHT
    assert (chosen / "model.safetensors").is_file() and not hub.home.exists()


def opened(rank: int, url: str) -> list[float]:
    with rankload.open_checkpoint(url) as checkpoint:
        return checkpoint["weight"].flatten().tolist()


def test_open_checkpoint_reads_the_cached_file(hub: Hub) -> None:
    hub.client("snapshot_download('org/two')")
    before = len(hub.origin.requests()) + len(hub.cdn.requests())
    [result] = hub.run(opened, "hf://org/two", RANKLOAD_OFFLINE="1")
    assert result.value == WEIGHT
    assert len(hub.origin.requests()) + len(hub.cdn.requests()) == before


def test_open_checkpoint_writes_nothing(hub: Hub) -> None:
    """A reference to a commit of which nothing is there would be a damaged cache to huggingface_hub."""
    [result] = hub.run(opened, "hf://org/two")
    assert result.value == WEIGHT and not list(hub.home.glob("hub/models--*"))


def load_named_file(rank: int) -> object:
    return load(rank, "hf://org/one", file_name="renamed.safetensors")


def test_file_name_that_is_chosen_goes_to_the_own_cache_and_is_found_offline(hub: Hub) -> None:
    assert hub.run(load_named_file)[0].value == WEIGHT
    assert not list(hub.home.glob("hub/models--*"))
    assert hub.run(load_named_file, HF_HUB_OFFLINE="1")[0].value == WEIGHT


def test_cache_without_links(hub: Hub) -> None:
    """huggingface_hub then puts the file itself at its path in the snapshot."""
    path = hub.directory("one") / "snapshots" / hf.COMMIT / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    [result] = hub.run(load, f"hf://org/one@{hf.COMMIT}/model.safetensors", RANKLOAD_OFFLINE="1")
    assert result.value == WEIGHT and os.listdir(hub.directory("one")) == ["snapshots"]


def test_expected_digest(hub: Hub) -> None:
    right, wrong = hashlib.sha256(WEIGHTS).hexdigest(), "0" * 64
    assert hub.run(with_digest, right)[0].value == WEIGHT
    [result] = hub.run(with_digest, wrong)
    assert result.value.startswith("DigestMismatchError") and len(hub.cdn.requests()) == 1


def with_digest(rank: int, sha256: str) -> object:
    return load(rank, "hf://org/one", sha256=sha256)


def test_gated_repository_needs_the_token(hub: Hub) -> None:
    hf.publish(hub.origin, "org/gated", {"model.safetensors": WEIGHTS}, cdn=hub.cdn, token="hf_SECRET")
    [refused] = hub.run(load, "hf://org/gated")
    assert refused.value.startswith("HTTPStatusError: HTTP Error 401") and "HF_TOKEN" in refused.value
    [result] = hub.run(load, "hf://org/gated", HF_TOKEN="hf_SECRET")
    assert result.value == WEIGHT and "hf_SECRET" not in result.stderr
    assert all("authorization" not in request.headers for request in hub.cdn.requests())


@pytest.mark.fault(62)
@pytest.mark.parametrize("is_endless", [False, True], ids=["pipe", "endless"])
@pytest.mark.parametrize("place", ["refs/main", "blobs"])
def test_what_another_user_has_put_into_the_cache_holds_no_call(hub: Hub, place: str, is_endless: bool) -> None:
    path = hub.directory("one") / place
    if place == "blobs":
        path /= hashlib.sha1(b"blob 2\0{}").hexdigest()
    path.parent.mkdir(parents=True)
    if is_endless:
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    [result] = run_ranks(
        fetch, 1, args=("hf://org/one/config.json",), rank_env={0: hub.environment}, timeout_seconds=20
    )
    if place == "refs/main":
        assert result.value == "{}" and path.read_text() == hf.COMMIT
    else:
        assert result.value.startswith(f"CacheError: cannot read {path}: it is no regular file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give links away")
@pytest.mark.fault(28)
@pytest.mark.parametrize("place", ["refs", "blobs", "snapshots", f"snapshots/{hf.COMMIT}", "weights", "."])
def test_links_of_another_user_in_the_cache_are_refused(hub: Hub, tmp_path: Path, place: str) -> None:
    """They could lead to a folder of this user's, who has a program called ``main`` there."""
    mine = tmp_path / "mine"
    mine.mkdir()
    contents = {"main": b"my program", "weights": NEWER}
    for name, content in contents.items():
        (mine / name).write_bytes(content)
    link, target = hub.directory("one") / place, mine
    if place == "weights":
        link, target = hub.directory("one") / "snapshots" / hf.COMMIT / "model.safetensors", mine / "weights"
    link.parent.mkdir(parents=True)
    if place.startswith(("snapshots", "weights")):
        (hub.directory("one") / "refs").mkdir()
        (hub.directory("one") / "refs" / "main").write_text(hf.COMMIT)
    link.symlink_to(target)
    os.chown(link, 12345, -1, follow_symlinks=False)
    text = hub.run(load, "hf://org/one/model.safetensors")[0].value
    assert text.startswith(f"CacheError: {link} is a symbolic link that belongs to uid 12345: refused")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == contents
    if not place.startswith("snapshots"):  # links in it would lead nowhere
        os.chown(link, os.geteuid(), -1, follow_symlinks=False)
        assert hub.run(load, "hf://org/one/model.safetensors")[0].value == WEIGHT
