"""huggingface_hub under the patch: one rank asks the Hub, all get the path, and errors keep their types."""

from __future__ import annotations

import json

import pytest

from harness import hf
from harness.origin import Origin
from harness.scripts import run_script, run_torchrun

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 4000, "other.bin": b"x" * 5000}

SCRIPT = """
import functools, json, os, sys
import torch.distributed as dist
from functools import partial
import huggingface_hub
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

bound = partial(hf_hub_download, library_name="timm")  # timm and open_clip do that at import
dist.init_process_group("gloo")
rank, name = dist.get_rank(), "org/tiny"
found = {}
found["again"] = [hf_hub_download(name, "config.json"), bound(name, "config.json")]
found["weights"] = hf_hub_download(repo_id=name, filename="model.safetensors")
found["content"] = open(found["weights"], "rb").read() == bytes(range(256)) * 4000
found["snapshot"] = sorted(os.listdir(snapshot_download(name, ignore_patterns=["*.bin"])))
for attempt in range(2):
    try:
        hf_hub_download(name, "missing.json")
    except EntryNotFoundError as error:
        found[f"missing {attempt}"] = [type(error).__name__, error.response.status_code, str(error).splitlines()[0]]
found["forced"] = hf_hub_download(name, "config.json", force_download=True)
dist.barrier()
if rank == 0:
    found["alone"] = hf_hub_download(name, "other.bin")
dist.barrier()
found["late"] = hf_hub_download(name, "other.bin")
print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture
def job(tmp_path):
    """Run the script with as many ranks, patched or not; return what each printed, and the Hub's requests."""

    def run(ranks, *, patched=True, body=SCRIPT, token=None):
        with Origin() as origin, Origin() as cdn:  # clients follow no redirect of weights on the Hub's own host
            repository = hf.publish(origin, "org/tiny", FILES, token=token, cdn=cdn, missing=["missing.json"])
            script = tmp_path / "script.py"
            script.write_text(body)
            cache = tmp_path / f"hf-{ranks}-{patched}"
            environment = {**repository.environment, "HF_HOME": str(cache), "TORCH_HOME": str(tmp_path / "torch")}
            if patched:
                words, options = ("rankload", ranks, "run", script), ("--standalone", "--module")
            else:
                words, options = (script, ranks), ("--standalone",)
            result = run_torchrun(*words, options=options, env=environment).check()
            streams = [out for (_, _), (out, _) in sorted(result.worker_streams.items())]
            requests = [f"{one.method} {one.path}" for one in (*origin.requests(), *cdn.requests())]
            return [json.loads(out) for out in streams], requests, cache

    return run


@pytest.mark.fault(91)
def test_requests_do_not_grow_with_ranks_and_results_are_those_without_the_patch(job):
    [alone], expected, _ = job(1, patched=False)
    results, requests, cache = job(4)
    unpatched_root, patched_root = str(cache.parent / "hf-1-False"), str(cache)
    alone = json.loads(json.dumps(alone).replace(unpatched_root, patched_root))
    for rank, found in enumerate(results):
        assert found == alone if rank == 0 else {key: value for key, value in alone.items() if key != "alone"} == found
    assert sorted(set(requests)) == sorted(set(expected))
    assert len(requests) <= len(expected)
    body = [one for one in requests if one.startswith("GET") and "blobs/" in one]
    assert len(body) == len(set(body)) == 2
    scanned = run_script(
        "from huggingface_hub import scan_cache_dir; print(scan_cache_dir().warnings)", env={"HF_HOME": str(cache)}
    ).check()
    assert scanned.stdout == "[]\n"


def test_offline_and_local_files_make_no_stamp(job):
    body = """
import json, os
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
try:
    hf_hub_download("org/tiny", "config.json", local_files_only=True)
except LocalEntryNotFoundError as error:
    print(json.dumps(type(error).__name__))
"""
    results, requests, cache = job(2, body=body)
    assert results == ["LocalEntryNotFoundError"] * 2 and requests == []
    assert not (cache / "hub" / ".locks").exists()


def test_local_dir(job, tmp_path):
    body = f"""
import json
from huggingface_hub import hf_hub_download
print(json.dumps(hf_hub_download("org/tiny", "model.safetensors", local_dir={str(tmp_path / "here")!r})))
"""
    results, requests, _ = job(3, body=body)
    assert results == [str(tmp_path / "here" / "model.safetensors")] * 3
    assert len([one for one in requests if one.startswith("GET") and "blobs/" in one]) == 1
    assert [path.name for path in (tmp_path / "here").iterdir() if not path.name.startswith(".")] == [
        "model.safetensors"
    ]


def test_unknown_version_is_left_alone(monkeypatch, caplog):
    from rankload._patch import huggingface_hub

    def hf_hub_download(repo, name):
        pass

    assert huggingface_hub.once(hf_hub_download) is None
    assert "left alone" in caplog.text and huggingface_hub.KNOWN_VERSIONS in caplog.text


@pytest.mark.parametrize(
    "url", ["https://cdn.example/blob?Expires=1&Signature=secret", "https://user:secret@hub.example/org/one"]
)
def test_stamp_of_an_error_has_no_secret_of_the_url(url: str) -> None:
    pytest.importorskip("huggingface_hub.errors")
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    from rankload._patch import huggingface_hub

    response = httpx2.Response(403, request=httpx2.Request("GET", url))
    wire = huggingface_hub._encode(HfHubHTTPError(f"403 for url {url}", response=response))
    assert wire is not None and wire["status"] == 403 and "secret" not in json.dumps(wire)
    rebuilt = huggingface_hub._decode(wire)
    assert isinstance(rebuilt, HfHubHTTPError) and rebuilt.response.url.host in url
    assert "secret" not in huggingface_hub._endpoint_key("https://user:secret@hub.example")
