"""Files that are not rankload's own, written again while what was loaded from them is in use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from harness import fuse
from harness.ranks import run_ranks

_SIZE = 600  # 1.4 MB: many pages


def trained(seed: int) -> tuple[nn.Linear, torch.optim.Adam]:
    torch.manual_seed(seed)
    module = nn.Linear(_SIZE, _SIZE)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, _SIZE)).sum().backward()
    optimizer.step()
    return module, optimizer


def write(path: Path, seed: int) -> None:
    """A training checkpoint, or, by its suffix, a model's safetensors, or an index with one part."""
    module, optimizer = trained(seed)
    if path.suffix == ".json":
        write(path.with_name("part.safetensors"), seed)
        weight_map = dict.fromkeys(module.state_dict(), "part.safetensors")
        path.write_text(json.dumps({"weight_map": weight_map}))
    elif path.suffix == ".safetensors":
        save_file(dict(module.state_dict()), path)
    else:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path)


def data_of(path: Path) -> Path:
    return path.with_name("part.safetensors") if path.suffix == ".json" else path


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for child in children for tensor in tensors_in(child)]


def by_state_dict(path: Path) -> Any:
    import rankload

    return rankload.dist_load_state_dict_from_url(path)


def by_file_url(path: Path) -> Any:
    import rankload

    return rankload.dist_load_state_dict_from_url(path.as_uri())


def by_load(path: Path) -> Any:
    import rankload

    return rankload.load(path)


def by_hub(path: Path) -> Any:
    import rankload.hub

    return rankload.hub.load_state_dict_from_url(path.as_uri(), progress=False)


def into_module_and_optimizer(path: Path) -> Any:
    import rankload

    module, optimizer = trained(99)
    rankload.dist_load_into((module, optimizer), path)
    return [module.state_dict(), optimizer.state_dict()]


def into_meta(path: Path) -> Any:
    import rankload
    from rankload import adapt

    with torch.device("meta"):
        module = nn.Linear(_SIZE, _SIZE)
    rankload.dist_load_into(module, path, adapt=adapt.unwrap("model") if path.suffix == ".pth" else None)
    return module.state_dict()


def into_assigned(path: Path) -> Any:
    import rankload
    from rankload import adapt

    module = nn.Linear(_SIZE, _SIZE)
    rankload.dist_load_into(module, path, assign=True, adapt=adapt.unwrap("model") if path.suffix == ".pth" else None)
    return module.state_dict()


def by_own_adapter(path: Path) -> Any:
    """Which keeps what it is given."""
    import rankload

    kept: list[Any] = []

    def adapter(content: Any) -> Any:
        kept.append(content)
        return content.get("model", content)

    rankload.dist_load_into(nn.Linear(_SIZE, _SIZE), path, adapt=adapter)
    return kept


ALL_WAYS = [by_state_dict, by_file_url, by_load, by_hub, into_meta, into_assigned, by_own_adapter]


def write_again(path: Path, how: str) -> None:
    other = path.with_name(f"other-{os.getpid()}")
    write(other.with_suffix(path.suffix), 2)
    if how == "torch.save":  # cuts the file off first
        module, optimizer = trained(3)
        with data_of(path).open("wb") as file:
            torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    elif how == "truncated":
        os.truncate(data_of(path), 100)
    else:
        shutil.copyfile(data_of(other.with_suffix(path.suffix)), data_of(path))


def load_and_overwrite(rank: int, way: Callable[[Path], Any], path: Path, how: str) -> bool:
    loaded = way(path)
    before = [tensor.clone() for tensor in tensors_in(loaded)]
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if rank == 0:
        write_again(path, how)
    torch.distributed.barrier()
    same = all(map(torch.equal, before, tensors_in(loaded)))
    for tensor in tensors_in(loaded):
        if tensor.is_floating_point():
            tensor.detach().add_(1)  # touches every page
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return bool(before) and same


@pytest.mark.fault(72)
@pytest.mark.parametrize("how", ["torch.save", "truncated", "same size"])
@pytest.mark.parametrize("way", ALL_WAYS)
def test_what_was_loaded_stays(tmp_path: Path, way: Callable[[Path], Any], how: str) -> None:
    write(path := tmp_path / "last.pth", 1)
    assert [result.value for result in run_ranks(load_and_overwrite, 2, args=(way, path, how))] == [True, True]


@pytest.mark.fault(72)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("way", [by_state_dict, by_load, into_meta, into_assigned])
def test_other_formats(tmp_path: Path, way: Callable[[Path], Any], name: str) -> None:
    write(path := tmp_path / name, 1)
    assert [result.value for result in run_ranks(load_and_overwrite, 2, args=(way, path, "truncated"))] == [True] * 2


@pytest.mark.fault(72)
@pytest.mark.parametrize("how", ["torch.save", "same size"])
def test_module_and_optimizer_resume_and_save_to_the_same_path(tmp_path: Path, how: str) -> None:
    write(path := tmp_path / "last.pth", 1)
    results = run_ranks(load_and_overwrite, 2, args=(into_module_and_optimizer, path, how))
    assert [result.value for result in results] == [True, True]
    assert torch.load(path)["model"].keys() == {"weight", "bias"}


def load_cached(rank: int, url: str, cache: Path) -> bool:
    """A file that rankload has published stays mapped; one that lies there under its name does not."""
    import rankload

    content = rankload.dist_load_state_dict_from_url(url, cache)
    return any(str(cache) in line for line in Path("/proc/self/maps").read_text().splitlines()) and bool(content)


def test_published_file_stays_mapped_and_torch_hubs_does_not(origin: Any, tmp_path: Path) -> None:
    write(path := tmp_path / "last.pth", 1)
    url = origin.add("last.pth", path)
    for _ in range(2):
        assert [result.value for result in run_ranks(load_cached, 2, args=(url, tmp_path / "cache"))] == [True, True]
    (tmp_path / "hub").mkdir()
    shutil.copyfile(path, tmp_path / "hub" / "last.pth")
    for _ in range(2):
        assert [result.value for result in run_ranks(load_cached, 2, args=(url, tmp_path / "hub"))] == [False, False]
    assert origin.request_count() == 2  # once to ask whether torch.hub's is the origin's


def load_with_little_memory(rank: int, path: Path, free_bytes: int) -> tuple[bool, bool]:
    import rankload
    from rankload._load.node import node_copy

    node_copy.available_bytes = lambda: free_bytes
    content = rankload.dist_load_state_dict_from_url(path)
    maps = Path("/proc/self/maps").read_text()
    return str(path) in maps, bool(content)


def test_without_memory_for_a_copy_the_file_is_mapped_with_a_warning(tmp_path: Path) -> None:
    write(path := tmp_path / "last.pth", 1)
    for free_bytes, is_mapped in ((1_000_000, True), (1_000_000_000, False)):
        results = run_ranks(load_with_little_memory, 2, args=(path, free_bytes))
        assert [result.value for result in results] == [(is_mapped, True)] * 2
        assert ("too little free memory" in results[0].stderr) == is_mapped


@pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))
def test_file_on_a_network_filesystem_is_read_once_a_node_and_not_mapped(origin: Any, tmp_path: Path) -> None:
    write(path := tmp_path / "last.pth", 1)
    url = origin.add("last.pth", path)
    with fuse.mounted(tmp_path / "server", tmp_path / "mount") as mount:
        results = run_ranks(load_cached, 2, args=(url, mount.path / "cache"))
        assert [result.value for result in results] == [False, False]


@pytest.mark.parametrize("files", [
    {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 100 kB\n"},
    {"proc/meminfo": "MemAvailable: 900 kB\n", "proc/self/cgroup": "0::/job/step\n",
     "sys/fs/cgroup/job/step/memory.max": "max\n", "sys/fs/cgroup/job/memory.max": "204800\n",
     "sys/fs/cgroup/job/memory.current": "122880\n", "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 20480\n"},
    {"proc/meminfo": "MemAvailable: 900 kB\n", "proc/self/cgroup": "4:cpu,memory:/job\n",
     "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "204800\n",
     "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "122880\n",
     "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 20480\n"},
])  # fmt: skip
def test_available_memory(tmp_path: Path, files: dict[str, str]) -> None:
    from rankload._load.node.available_memory import available_bytes

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == 102400
    assert available_bytes(tmp_path / "nothing") is None
    assert available_bytes() is not None
