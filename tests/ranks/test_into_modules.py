"""`dist_load_into` in several ranks: wrapped, sharded and tensor-parallel modules, and one error for all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from harness.origin import Origin
from harness.ranks import run_ranks


class Block(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(37, 61), nn.LayerNorm(61), nn.Linear(61, 37, bias=False)
        self.register_buffer("positions", torch.rand(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class Net(nn.Module):
    """Two blocks between tied matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 37)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(37, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def source() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.fixture(params=["zip", "safetensors"])
def url(request: pytest.FixtureRequest, source: Net, origin: Origin, tmp_path: Path) -> str:
    """The source's weights, at an origin."""
    content = source.state_dict()
    if request.param == "zip":
        torch.save(content, file := io.BytesIO())
        return origin.add("net.pth", file.getvalue())
    del content["head.weight"]
    save_file(content, tmp_path / "net.safetensors")
    return origin.add("net.safetensors", tmp_path / "net.safetensors")


def _full(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole tensors of a module, gathered from all ranks."""
    from torch.distributed.tensor import DTensor

    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }


def _own_bytes(module: nn.Module) -> int:
    """Of this rank's parts of all tensors, each counted once."""
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors.values())


def _load_each(rank: int, url: str, model_dir: str) -> dict[str, Any]:
    """Loads into each case's module; returns the whole tensors, an output, the bytes read, and those that had to be."""
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    results = {}
    for kind, device in _CASES:
        with torch.device(device):
            net = Net()
        module = _KINDS[kind](net)
        missing, unexpected = report = dist_load_into(module, url, model_dir)
        assert missing == unexpected == [], (kind, device)
        assert net.head.weight is net.embedding.weight, (kind, device)
        output = module(torch.arange(8).reshape(2, 4)).detach() if kind in _RUNNABLE else None
        results[f"{kind} on {device}"] = _full(net), output, report.bytes_read, _own_bytes(net)
    dist.barrier()
    dist.destroy_process_group()
    return results


def _replicated(net: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def _fully_sharded(net: Net, mesh: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _hybrid(net: Net) -> nn.Module:
    """Replicated over one dimension of the mesh, sharded over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    return _fully_sharded(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def _tensor_parallel(net: Net, mesh: Any = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh or init_device_mesh("cpu", (4,))
    for block in net.blocks:
        plan = {"up": ColwiseParallel(output_layouts=_replicate()), "down": RowwiseParallel(input_layouts=_replicate())}
        parallelize_module(block, mesh, plan)
    return net


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _sharded_and_tensor_parallel(net: Net) -> nn.Module:
    """FSDP over one dimension of the mesh, tensor-parallel over the other: parameters are cut twice."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return _fully_sharded(_tensor_parallel(net, mesh["tp"]), mesh["dp"])


def _placed_by_hand(net: Net) -> nn.Module:
    """Every placement there is, on two dimensions, buffers too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    kinds = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(1)), (Shard(0), Shard(0))]
    weights = [block.up for block in net.blocks] + [block.down for block in net.blocks]
    for linear, placements in zip(weights, kinds, strict=True):
        linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, placements))
    block = net.blocks[0]
    block.norm.weight = nn.Parameter(distribute_tensor(block.norm.weight, mesh, (Replicate(), Replicate())))
    block.positions = distribute_tensor(block.positions, mesh, (Shard(1), Replicate()))
    return net


_KINDS = {
    "ddp": _replicated,
    "fsdp": _fully_sharded,
    "hybrid": _hybrid,
    "tensor-parallel": _tensor_parallel,
    "fsdp-and-tensor-parallel": _sharded_and_tensor_parallel,
    "by-hand": _placed_by_hand,
}
_RUNNABLE = {"ddp", "fsdp", "hybrid", "tensor-parallel", "fsdp-and-tensor-parallel"}
_CASES = [*((kind, "cpu") for kind in _KINDS), ("fsdp", "meta"), ("hybrid", "meta"), ("tensor-parallel", "meta")]


def test_each_rank_reads_its_own_part(origin: Origin, url: str, cache_dir: str, source: Net) -> None:
    results = run_ranks(_load_each, 4, args=(url, cache_dir))
    expected = source.state_dict()
    for result in results:
        assert len(result.value) == len(_CASES)
        for case, (tensors, output, bytes_read, own_bytes) in result.value.items():
            assert {*tensors} == {*expected}, case
            for name, tensor in tensors.items():
                assert torch.equal(tensor, expected[name]), (case, name)
            if output is not None:
                torch.testing.assert_close(output, source(torch.arange(8).reshape(2, 4)).detach())
            assert bytes_read == own_bytes, case
    assert origin.request_count() == 1


def _train_after_loading(rank: int, url: str, model_dir: str) -> list[float]:
    """Loads into a module that has trained, and trains on: FSDP has to take notice of the new weights."""
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    torch.manual_seed(5)
    module = _fully_sharded(Net())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        dist_load_into(module, url, model_dir)
        loss = module(torch.arange(8).reshape(2, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dist.barrier()
    dist.destroy_process_group()
    return losses


def test_loading_again_after_training_steps(origin: Origin, url: str, cache_dir: str, source: Net) -> None:
    expected = source(torch.arange(8).reshape(2, 4)).square().sum().item()
    for result in run_ranks(_train_after_loading, 2, args=(url, cache_dir)):
        assert result.value == pytest.approx([expected] * 3)


def _go_back_after_loading(rank: int, path: Path) -> str:
    """Loads between a forward and its backward, which needs the old weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from rankload import dist_load_into

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    module = nn.ParameterDict({"weight": nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))})
    loss: Any = (module["weight"] * module["weight"]).sum()
    dist_load_into(module, path)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    finally:
        dist.barrier()
        dist.destroy_process_group()
    return "went on with the new weight"


def test_a_backward_that_needs_the_old_weights_fails(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((5, 3), 2.0)}, path := tmp_path / "weight.pth")
    for result in run_ranks(_go_back_after_loading, 2, args=(path,)):
        assert "modified by an inplace operation" in result.value


def _steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = module(torch.arange(8).reshape(2, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _go_on_training(rank: int, path: Path) -> tuple[list[float], bool]:
    """Takes a training checkpoint into FSDP and AdamW, and goes on; tells whether the state is sharded."""
    from torch.distributed.tensor import DTensor

    from rankload import dist_load_into

    dist.init_process_group("gloo")
    torch.manual_seed(5)
    module = _fully_sharded(Net())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    dist_load_into((module, optimizer), path)
    states = [state["exp_avg"] for state in optimizer.state.values()]
    losses = _steps(module, optimizer, 2)
    dist.barrier()
    dist.destroy_process_group()
    return losses, all(isinstance(state, DTensor) for state in states)


@pytest.mark.parametrize("is_by_name", [False, True])
def test_a_training_checkpoint_into_fsdp_and_its_optimizer(tmp_path: Path, is_by_name: bool) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    _steps(net, optimizer, 2)
    state = get_optimizer_state_dict(net, optimizer) if is_by_name else optimizer.state_dict()
    torch.save({"model": net.state_dict(), "optimizer": state}, path := tmp_path / "training.pth")
    expected = _steps(net, optimizer, 2)
    for result in run_ranks(_go_on_training, 3, args=(path,)):
        losses, is_sharded = result.value
        assert losses == pytest.approx(expected, rel=1e-4) and is_sharded


def _load_where_one_differs(rank: int, url: str, model_dir: str) -> tuple[str, bool]:
    """Loads into a module that is another one on rank 2; returns the error, and whether anything was written."""
    from rankload import LoadError, dist_load_into

    net = Net()
    if rank == 2:
        net.blocks[1].up = nn.Linear(37, 60)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        dist_load_into(net, url, model_dir)
    except LoadError as error:
        return str(error), all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    return "", False


def test_one_rank_whose_module_differs_keeps_all_from_writing(origin: Origin, url: str, cache_dir: str) -> None:
    for result in run_ranks(_load_where_one_differs, 4, args=(url, cache_dir)):
        text, is_untouched = result.value
        assert "blocks.1.up.weight" in text and "rank 2" in text and is_untouched


def _load_with_partial_placement(rank: int, url: str, model_dir: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    from rankload import LoadError, dist_load_into

    dist.init_process_group("gloo")
    net = Net()
    mesh = init_device_mesh("cpu", (2,))
    net.blocks[0].positions = DTensor.from_local(net.blocks[0].positions, mesh, [Partial()])
    with pytest.raises(LoadError) as caught:
        dist_load_into(net, url, model_dir)
    dist.destroy_process_group()
    return str(caught.value)


def test_partial_placements_are_refused(origin: Origin, url: str, cache_dir: str) -> None:
    for result in run_ranks(_load_with_partial_placement, 2, args=(url, cache_dir)):
        assert "blocks.0.positions" in result.value and "Partial" in result.value


def _load_into_fsdp1(rank: int, path: Path, use_orig_params: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from rankload import ArgumentError, dist_load_into

    dist.init_process_group("gloo")
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with pytest.raises(ArgumentError) as caught:
        dist_load_into(nn.Sequential(wrapped), path)
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_with_what_works(tmp_path: Path, use_orig_params: bool) -> None:
    torch.save(nn.Linear(64, 64).state_dict(), tmp_path / "file.pth")
    for result in run_ranks(_load_into_fsdp1, 2, args=(tmp_path / "file.pth", use_orig_params)):
        assert "before it is wrapped" in result.value and "fully_shard" in result.value
