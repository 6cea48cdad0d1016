"""``hf://org/name`` without a file, and dist_snapshot: the Hub as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

import rankload
from harness import hf
from harness.origin import Origin
from harness.ranks import run_ranks
from harness.scripts import run_script
from rankload._fetch.hub_names import HubRepository
from rankload._fetch.hub_weights import choose_weights
from rankload.errors import FetchError, OfflineError

STATE_DICT = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://org/name", HubRepository("org/name", None, None)),
        ("hf://org/name/", HubRepository("org/name", None, None)),
        ("hf://org/na.me-2@v1", HubRepository("org/na.me-2", "v1", None)),
        ("hf://org/name@refs%2Fpr%2F1?variant=fp16", HubRepository("org/name", "refs/pr/1", "fp16")),
        ("hf://org/name/model.safetensors", None),
        ("hf://datasets/org", None),
        ("hf://org/name?x=1", None),
        ("https://org/name", None),
        (Path("hf://org/name"), None),
    ],
)
def test_which_urls_name_a_repository(url: object, expected: HubRepository | None) -> None:
    assert HubRepository.parse(url) == expected


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        ("model.safetensors.index.json model-00001-of-00002.safetensors pytorch_model.bin", None, 0),
        ("pytorch_model.bin model.safetensors", None, 1),
        ("model.fp16.safetensors model.safetensors", None, 1),
        ("model.fp16.safetensors model.safetensors", "fp16", 0),
        ("model.safetensors.index.json model.safetensors.index.fp16.json", "fp16", 1),
        ("diffusion_pytorch_model.safetensors config.json", None, 0),
        ("open_clip_model.safetensors open_clip_pytorch_model.bin", None, 0),
        ("resnet.a1_in1k.safetensors README.md", None, 0),
        ("pytorch_model.bin.index.json pytorch_model-00001-of-00002.bin", None, 0),
        ("weights.bin vocab.txt", None, 0),
        ("unet/model.safetensors weights.bin", None, 1),
    ],
)
def test_which_file_has_the_weights(names: str, variant: str | None, expected: int) -> None:
    assert choose_weights(names.split(), variant, "hf://org/name") == names.split()[expected]


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        ("one.safetensors two.safetensors", None, r"several weights \(one.safetensors, two.safetensors\)"),
        ("config.json", None, "has no weights"),
        ("model.safetensors", "fp16", "no variant 'fp16'"),
    ],
)
def test_repository_whose_weights_nobody_can_tell(names: str, variant: str | None, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        choose_weights(names.split(), variant, "hf://org/name")


@pytest.fixture
def hub(origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A repository with one safetensors file, another with two and their index; variables lead there."""
    with Origin() as cdn:
        one = {"config.json": b"{}", "model.safetensors": save(STATE_DICT), "model.fp16.safetensors": save(HALF)}
        repository = hf.publish(origin, "org/one", one, cdn=cdn)
        parts = {f"model-0000{n}-of-00002.safetensors": save({k: v}) for n, (k, v) in enumerate(STATE_DICT.items(), 1)}
        weight_map = dict(zip(STATE_DICT, parts, strict=True))
        index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        hf.publish(origin, "org/two", {**parts, "model.safetensors.index.json": index}, cdn=cdn)
        variables = {**repository.environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        yield variables, origin, cdn


HALF = {name: value.half() for name, value in STATE_DICT.items()}


def load_and_fetch(rank: int, cache: str) -> list[object]:
    found = [rankload.dist_load_state_dict_from_url("hf://org/one", cache)["weight"].tolist()]
    found.append(str(rankload.dist_load_state_dict_from_url("hf://org/one?variant=fp16", cache)["weight"].dtype))
    module = nn.Linear(3, 2)
    rankload.dist_load_into(module, "hf://org/two", cache)
    found.append(module.weight.tolist())
    return found


def load_offline(rank: int, cache: str, url: str) -> object:
    try:
        return rankload.dist_load_state_dict_from_url(url, cache)["weight"].tolist()
    except OfflineError as error:
        return str(error)


def each(environment: dict[str, str | None], ranks: int = 3) -> dict[int, dict[str, str]]:
    return {rank: {name: value for name, value in environment.items() if value is not None} for rank in range(ranks)}


def test_weights_of_a_repository_once_per_job_and_offline_afterwards(hub, tmp_path: Path) -> None:
    environment, origin, cdn = hub
    cache, weight = str(tmp_path / "cache"), STATE_DICT["weight"].tolist()
    results = run_ranks(load_and_fetch, 3, args=(cache,), rank_env=each(environment))
    assert [result.value for result in results] == [[weight, "torch.float16", weight]] * 3
    assert origin.request_count("api/models/org/one") == 2  # with and without the variant
    assert origin.request_count("api/models/org/two") == 1
    assert len(cdn.requests()) == 4  # the two files, and the two parts

    before = len(origin.requests())
    offline = each({**environment, "HF_HUB_OFFLINE": "1"})
    results = run_ranks(load_offline, 3, args=(cache, "hf://org/one"), rank_env=offline)
    assert [result.value for result in results] == [weight] * 3
    results = run_ranks(load_offline, 3, args=(cache, "hf://org/unknown"), rank_env=offline)
    assert all("no earlier call has asked" in result.value for result in results)
    assert len(origin.requests()) == before


def test_prefetch_and_open(hub, tmp_path: Path) -> None:
    environment, _, _ = hub
    code = (
        "import sys, rankload\n"
        "from rankload._cli import main\n"
        "with rankload.open_checkpoint('hf://org/two') as checkpoint:\n"
        "    print(sorted(checkpoint), checkpoint['bias'].tolist())\n"
        "sys.argv = ['rankload', 'prefetch', 'hf://org/two', '--quiet', '--model-dir', sys.argv[1]]\n"
        "main()\n"
    )
    result = run_script(code, tmp_path / "cache", env=environment).check()
    opened, path = result.stdout.splitlines()
    assert opened == "['bias', 'weight'] [1.0, 1.0]"
    assert Path(path).name == "model.safetensors.index.json" and len(list(Path(path).parent.glob("*.safetensors"))) == 2


FORGED = "2026-11-29 INFO all ranks are well"

#: Names in a Hub's answer that no file of weights has, or that nobody could write or show.
ODD_NAMES = (
    f"x\n{FORGED}\x1b[2J.safetensors",
    "\ud800.safetensors",
    "\0.safetensors",
    f"{'x' * 300}.safetensors",
    7,
    None,
)


@pytest.mark.fault(70)
def test_odd_names_in_the_answer_of_a_hub(origin: Origin, tmp_path: Path) -> None:
    variables = {}
    for number, name in enumerate(ODD_NAMES):
        repository = hf.publish(origin, f"org/odd{number}", {"model.safetensors": save(STATE_DICT)})
        variables = {**repository.environment, "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
        info = {"id": f"org/odd{number}", "sha": hf.COMMIT, "siblings": [{"rfilename": name}], "tags": []}
        origin.add(f"api/models/org/odd{number}", json.dumps(info).encode())
    code = (
        "import logging, rankload\n"
        "logging.getLogger('rankload').setLevel(logging.INFO)\n"
        "logging.basicConfig(format='%(message)s')\n"
        "for number in range(6):\n"
        "    for call in (rankload.open_checkpoint, rankload.dist_load_state_dict_from_url):\n"
        "        try:\n"
        "            call(f'hf://org/odd{number}')\n"
        "        except rankload.RankloadError as error:\n"
        "            print(error)\n"
    )
    result = run_script(code, env={**variables, "RANKLOAD_RETRIES": "0"}).check()
    errors = result.stdout.splitlines()
    assert len(errors) == 2 * len(ODD_NAMES) and all(error.isprintable() for error in errors)
    assert not any(line.startswith(FORGED) for line in result.stderr.splitlines())


def snapshot(rank: int) -> object:
    try:
        return str(rankload.dist_snapshot("org/one", ignore_patterns="*.fp16.*"))
    except rankload.FetchError as error:
        return f"{type(error).__name__}: {error}"


def test_snapshot_once_per_job(hub, tmp_path: Path) -> None:
    environment, origin, cdn = hub
    values = {result.value for result in run_ranks(snapshot, 3, rank_env=each(environment))}
    [path] = map(Path, values)
    assert path.is_relative_to(tmp_path / "hf") and path.name == hf.COMMIT
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert len(cdn.requests()) == 1 and origin.request_count("api/models/org/one") <= 1
    offline = each({**environment, "RANKLOAD_OFFLINE": "1"})
    assert {result.value for result in run_ranks(snapshot, 3, rank_env=offline)} == values


def test_snapshot_that_fails_fails_on_all_ranks(hub) -> None:
    environment, _, _ = hub
    nowhere = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for result in run_ranks(snapshot, 3, rank_env=each(nowhere)):
        assert result.value.startswith("NetworkError: hf://org/one") and "rank 0" in result.value
    offline = {**environment, "RANKLOAD_OFFLINE": "1"}
    for result in run_ranks(snapshot, 3, rank_env=each(offline)):
        assert result.value.startswith("OfflineError: hf://org/one")
