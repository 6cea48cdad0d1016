"""Libraries as they are, under ``rankload run``: every byte once for four ranks, and the same weights as without it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import hf
from harness.github import github
from harness.origin import Origin
from harness.scripts import run_script, run_torchrun

SCRIPTS = Path(__file__).with_name("scripts")


@pytest.fixture(scope="module", autouse=True)
def _importable() -> None:
    """The libraries can be imported here, too."""
    sys.path.insert(0, str(SCRIPTS))
    importlib.import_module("_job")
    sys.path.remove(str(SCRIPTS))


def weights_file(model: nn.Module, directory: Path, content: dict | None = None) -> Path:
    """The model's weights, under a name with their hash."""
    path = directory / "weights.pth"
    torch.save(model.state_dict() if content is None else content, path)
    return path.rename(path.with_name(f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


def run_patched(name: str, environment: dict[str, str], home: Path, ranks: int = 4) -> set[str]:
    """What the ranks of the script print."""
    words, options = ("run", SCRIPTS / f"{name}.py"), ("--standalone", "--module")
    result = run_torchrun("rankload", ranks, *words, options=options, env={**environment, **homes(home)}).check()
    found = {
        line for out, _ in result.worker_streams.values() for line in out.splitlines() if line.startswith("weights: ")
    }
    assert len(result.worker_streams) == ranks and len(found) == 1, result.worker_streams
    return found


def run_plain(name: str, environment: dict[str, str], home: Path) -> set[str]:
    result = run_script(SCRIPTS / f"{name}.py", env={**environment, **homes(home)}).check()
    return {line for line in result.stdout.splitlines() if line.startswith("weights: ")}


def homes(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "TORCH_HOME": str(home / "torch"),
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home),
    }


def torchvision_weights(directory: Path) -> tuple[Path, dict[str, str]]:
    import torchvision

    return weights_file(torchvision.models.shufflenet_v2_x0_5(), directory), {}


def timm_weights(directory: Path) -> tuple[Path, dict[str, str]]:
    import timm

    return weights_file(timm.create_model("test_resnet"), directory), {}


def mmengine_weights(directory: Path) -> tuple[Path, dict[str, str]]:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    return weights_file(model, directory, {"state_dict": model.state_dict(), "meta": {"epoch": 1}}), {}


def open_clip_weights(directory: Path) -> tuple[Path, dict[str, str]]:
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    config = directory / "tiny.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    return weights_file(open_clip.create_model("tiny"), directory), {"MODEL_CONFIG": str(config)}


@pytest.mark.parametrize(
    ("script", "make"),
    [
        ("torchvision_enum", torchvision_weights),
        ("timm_url", timm_weights),
        ("mmengine_load", mmengine_weights),
        ("open_clip_url", open_clip_weights),
    ],
)
def test_weights_at_a_url(origin: Origin, tmp_path: Path, script: str, make) -> None:
    path, environment = make(tmp_path)
    environment["WEIGHTS_URL"] = origin.add(path.name, path)
    found = run_patched(script, environment, tmp_path / "patched")
    assert [request.method for request in origin.requests()] == ["GET"]
    assert origin.bytes_sent() == path.stat().st_size
    assert found == run_plain(script, environment, tmp_path / "plain")


def timm_repository(directory: Path) -> tuple[str, dict[str, bytes], str]:
    import timm

    model = timm.create_model("test_resnet")
    timm.models.save_for_hf(model, directory / "repo", safe_serialization=True)
    return "org/tiny", read_all(directory / "repo"), hf.COMMIT


def transformers_repository(directory: Path) -> tuple[str, dict[str, bytes], str]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=1000, **sizes)).save_pretrained(directory / "repo")
    return "org/tiny", read_all(directory / "repo"), hf.COMMIT


def smp_repository(directory: Path) -> tuple[str, dict[str, bytes], str]:
    from safetensors.torch import save
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    settings = encoders["mobilenet_v2"]["pretrained_settings"]["imagenet"]
    content = save(get_encoder("mobilenet_v2", weights=None).state_dict())
    return settings["repo_id"], {"config.json": b"{}", "model.safetensors": content}, settings["revision"]


def read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("script", "make"),
    [
        ("timm_hub", timm_repository),
        ("transformers_auto", transformers_repository),
        ("segmentation_models", smp_repository),
    ],
)
def test_weights_on_the_hub(tmp_path: Path, script: str, make) -> None:
    name, files, commit = make(tmp_path)
    requests = {}
    for way, run in (("patched", run_patched), ("plain", run_plain)):
        with Origin() as origin, Origin() as cdn:
            repository = hf.publish(origin, name, files, cdn=cdn, commit=commit)
            found = run(script, repository.environment, tmp_path / way)
            requests[way] = [f"{one.method} {one.path}" for one in (*origin.requests(), *cdn.requests())], found
    (patched, weights), (plain, plain_weights) = requests["patched"], requests["plain"]
    assert weights == plain_weights
    assert sorted(patched) == sorted(plain)  # as one process alone asks


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
    path = weights_file(wav2vec2_model(**config), tmp_path)
    with github(tmp_path) as server:
        server.add_file("torchaudio/models/tiny.pth", path.read_bytes(), host="download.pytorch.org")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--module", "rankload", "run"]
        environment = {"MODEL_CONFIG": json.dumps(config), **homes(tmp_path / "home")}
        result = server.run(sys.executable, *torchrun, SCRIPTS / "torchaudio_pipeline.py", env=environment).check()
        assert server.requests() == ["download.pytorch.org/torchaudio/models/tiny.pth"]
    lines = [line for line in result.stdout.splitlines() if line.startswith("weights: ")]
    assert len(lines) == 4 and len(set(lines)) == 1
