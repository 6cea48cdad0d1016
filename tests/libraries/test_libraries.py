"""Libraries as they are, under ``rankload run``: every byte once for all ranks, and the right weights.

The scripts are those of the pages in docs/libraries, and of the folder beside this file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from docs.blocks import blocks_of
from harness import hf
from harness.github import github
from harness.origin import Origin
from harness.scripts import run_torchrun
from harness.waiting import wait_until

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "libraries"
RANKS = 2  # each imports the library, which is what takes the time; more show no more


@pytest.fixture(scope="module", autouse=True)
def _importable() -> None:
    """The libraries can be imported here, too."""
    sys.path.insert(0, str(HERE / "site"))
    importlib.import_module("cpu_builds")
    importlib.import_module("digest")
    sys.path.remove(str(HERE / "site"))


def script(name: str, directory: Path, texts: dict[str, str] | None = None, before: str = "") -> Path:
    """The first Python block of a page, or a script of the folder, with an ending that says what a rank has."""
    page = PAGES / f"{name}.md"
    if page.exists():
        text = next(block.text for block in blocks_of(page) if block.language == "python")
    else:
        text = (HERE / "scripts" / f"{name}.py").read_text()
    for said, meant in (texts or {}).items():
        assert said in text, f"{name} does not say {said}"
        text = text.replace(said, meant)
    path = directory / "train.py"
    path.write_text(f"{before}\n{text}\nfrom digest import finish\n\nfinish(model)\n")
    return path


def run(path: Path, home: Path, environment: dict[str, str], *, patched: bool = True) -> str:
    """The digest of the weights that the script has on all ranks."""
    variables = {**environment, **homes(home)}
    words, options = (("rankload", RANKS, "run", path), ["--module"]) if patched else ((path, RANKS), [])
    result = run_torchrun(*words, options=["--standalone", *options], env=variables).check()
    lines = [line for out, _ in result.worker_streams.values() for line in out.splitlines()]
    found = [line.removeprefix("weights: ") for line in lines if line.startswith("weights: ")]
    assert len(found) == RANKS and len(set(found)) == 1, lines
    return found[0]


def digest_of(model: nn.Module) -> str:
    """What a script prints that has this model's weights."""
    return importlib.import_module("digest").digest_of(model)


def homes(home: Path) -> dict[str, str]:
    folders = {"HOME": "", "TORCH_HOME": "torch", "HF_HOME": "hf", "XDG_CACHE_HOME": "cache"}
    return {"PYTHONPATH": str(HERE / "site"), **{name: str(home / folder) for name, folder in folders.items()}}


def weights_file(model: nn.Module, directory: Path, content: dict | None = None) -> Path:
    """The model's weights, under a name with their hash."""
    path = directory / "weights.pth"
    torch.save(model.state_dict() if content is None else content, path)
    return path.rename(path.with_name(f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


# --- weights at a URL ------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))


def torchvision_model(directory: Path) -> nn.Module:
    import torchvision

    return torchvision.models.shufflenet_v2_x0_5()


def timm_model(directory: Path) -> nn.Module:
    import timm

    return timm.create_model("test_resnet")


def open_clip_model(directory: Path) -> nn.Module:
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    config = directory / "tiny.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    return open_clip.create_model("tiny")


#: torchvision's own URL names a host that a test cannot reach, and a hash that no other file has.
TORCHVISION_URL = """
import torchvision
weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
object.__setattr__(weights.value, "url", "{url}")
"""


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("torchvision", torchvision_model),
        ("timm_url", timm_model),
        ("mmengine", lambda _: two_layers()),
        ("open_clip_url", open_clip_model),
    ],
)
def test_weights_at_a_url(origin: Origin, tmp_path: Path, name: str, make: Callable[[Path], nn.Module]) -> None:
    model = make(tmp_path)
    path = weights_file(model, tmp_path, {"state_dict": model.state_dict()} if name == "mmengine" else None)
    url = origin.add(path.name, path)
    is_torchvision = name == "torchvision"
    texts = {} if is_torchvision else {"https://example.org/weights-0a1b2c3d.pth": url}
    train = script(name, tmp_path, texts, TORCHVISION_URL.format(url=url) if is_torchvision else "")
    environment = {"MODEL_CONFIG": str(tmp_path / "tiny.json")}

    found = run(train, tmp_path / "home", environment)

    assert [request.method for request in origin.requests()] == ["GET"]
    assert origin.bytes_sent() == path.stat().st_size
    assert found == digest_of(model)


def test_without_rankload_every_rank_downloads(origin: Origin, tmp_path: Path) -> None:
    path = weights_file(torchvision_model(tmp_path), tmp_path)
    url = origin.add(path.name, path, hold_before_reply=True)
    train = script("torchvision", tmp_path, {}, TORCHVISION_URL.format(url=url))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, train, tmp_path / "home", {}, patched=False)
        try:  # a rank that came after another's download would find its file
            wait_until(lambda: running.done() or origin.request_count() == RANKS, 120, "all ranks ask")
        finally:
            origin.release(path.name)
        running.result()
    assert origin.bytes_sent() == RANKS * path.stat().st_size


def test_fabric_with_the_plugin(origin: Origin, tmp_path: Path) -> None:
    model = two_layers()
    path = weights_file(model, tmp_path, {"state_dict": model.state_dict()})
    texts = {"https://example.org/weights-0a1b2c3d.pth": origin.add(path.name, path), "devices=4": f"devices={RANKS}"}
    assert run(script("lightning", tmp_path, texts), tmp_path / "home", {}, patched=False) == digest_of(model)
    assert origin.request_count() == 1 and origin.bytes_sent() == path.stat().st_size


# --- weights on the Hub ----------------------------------------------------------------------------------------------


def timm_repository(directory: Path) -> tuple[str, dict[str, bytes], str, str]:
    import timm

    model = timm_model(directory)
    timm.models.save_for_hf(model, directory / "repo", safe_serialization=True)
    return "timm/resnet18.a1_in1k", read_all(directory / "repo"), hf.COMMIT, digest_of(model)


def transformers_repository(directory: Path) -> tuple[str, dict[str, bytes], str, str]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=1000, **sizes))
    model.save_pretrained(directory / "repo")
    return "google-bert/bert-base-uncased", read_all(directory / "repo"), hf.COMMIT, digest_of(model)


def smp_repository(directory: Path) -> tuple[str, dict[str, bytes], str, str]:
    from safetensors.torch import save
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    settings = encoders["mobilenet_v2"]["pretrained_settings"]["imagenet"]
    model = get_encoder("mobilenet_v2", weights=None)
    files = {"config.json": b"{}", "model.safetensors": save(model.state_dict())}
    return settings["repo_id"], files, settings["revision"], digest_of(model)


def read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("timm", timm_repository),
        ("transformers", transformers_repository),
        ("segmentation_models", smp_repository),
    ],
)
def test_weights_on_the_hub(tmp_path: Path, name: str, make: Callable[[Path], tuple[str, dict, str, str]]) -> None:
    repository_name, files, commit, expected = make(tmp_path)
    with Origin() as origin, Origin() as cdn:
        repository = hf.publish(origin, repository_name, files, cdn=cdn, commit=commit)
        assert run(script(name, tmp_path), tmp_path / "home", repository.environment) == expected
        asked = [f"{one.method} {one.path}" for one in (*origin.requests(), *cdn.requests())]
    assert asked and len(asked) == len(set(asked)), asked  # nothing twice, however many ranks


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="torchaudio's host needs a namespace: root")
def test_torchaudio_pipeline(tmp_path: Path) -> None:
    from torchaudio.models import wav2vec2_model

    layers = [[8, 10, 5], [8, 3, 2]]
    config = {
        "extractor_mode": "group_norm", "extractor_conv_layer_config": layers, "extractor_conv_bias": False,
        "encoder_embed_dim": 16, "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2, "encoder_num_layers": 1, "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 32, "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": None,
    }  # fmt: skip
    model = wav2vec2_model(**config)
    path = weights_file(model, tmp_path)
    train = script("torchaudio_pipeline", tmp_path)
    with github(tmp_path) as server:
        server.add_file("torchaudio/models/tiny.pth", path.read_bytes(), host="download.pytorch.org")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--module", "rankload"]
        environment = {"MODEL_CONFIG": json.dumps(config), **homes(tmp_path / "home")}
        result = server.run(sys.executable, *torchrun, "run", train, env=environment).check()
        assert server.requests() == ["download.pytorch.org/torchaudio/models/tiny.pth"]
    lines = [line for line in result.stdout.splitlines() if line.startswith("weights: ")]
    assert lines == [f"weights: {digest_of(model)}"] * RANKS
