"""`dist_load_into` and modules with hooks of their own: they see, keep and change what load_state_dict shows them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankload import LoadError, dist_load_into

ONES = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


def saved(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


class Doubling(nn.Linear):
    """Computes something behind the load, as quantised modules and caches do."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.doubled = torch.zeros(0)
        self.times = 0
        self.register_load_state_dict_post_hook(Doubling._double)

    @staticmethod
    def _double(module: Any, keys: Any) -> None:
        module.doubled = module.weight * 2
        module.times += 1
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("extra")]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_post_hooks_see_the_new_weights_once(tmp_path: Path, device: str) -> None:
    module = nn.Sequential(Doubling(3, 2, device=device))
    dist_load_into(module, saved(tmp_path, {f"0.{name}": tensor for name, tensor in ONES.items()}))
    assert torch.equal(module[0].doubled, torch.full((2, 3), 2.0)) and module[0].times == 1
    assert module[0].doubled.requires_grad, "hooks run as they would behind load_state_dict"
    assert len(module[0]._load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("name", ["extra", "other"])
def test_post_hooks_have_a_say_in_missing_keys(tmp_path: Path, name: str) -> None:
    module = Doubling(3, 2)
    module.register_parameter(name, nn.Parameter(torch.zeros(1)))
    path = saved(tmp_path, ONES)
    if name == "extra":
        assert [*dist_load_into(module, path)] == [[], []]
        return
    with pytest.raises(LoadError, match="other"):
        dist_load_into(module, path)


class WithPreHook(nn.Linear):
    """Does something to the state dict before it is loaded."""

    def __init__(self, hook: Any) -> None:
        super().__init__(3, 2)
        self.kept: Any = None
        self.kept_in_a_list: list[Any] = []
        self.register_load_state_dict_pre_hook(lambda module, content, *_: hook(module, content))


def _fill(module: Any, content: Any) -> None:
    content["weight"][0] = 5.0


def _triple(module: Any, content: Any) -> None:
    content["weight"].mul_(3)


@pytest.mark.parametrize("hook", [_triple, _fill])
@pytest.mark.parametrize("assign", [None, True])
def test_what_a_hook_changes_in_place_is_what_is_loaded(tmp_path: Path, hook: Any, assign: bool | None) -> None:
    path, module = saved(tmp_path, ONES), WithPreHook(hook)
    expected = WithPreHook(hook)
    expected.load_state_dict(torch.load(path))
    dist_load_into(module, path, assign=assign)
    assert torch.equal(module.weight, expected.weight)
    assert torch.equal(torch.load(path)["weight"], ONES["weight"]), "the file is never written"


def test_what_a_hook_asks_for(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def check_cancelled(module: Any, content: Any) -> None:
        bias = content["bias"]
        seen.update(ndim=bias.ndim, size=bias.size(0), device=bias.device, dim=bias.dim(), numel=bias.numel())
        seen.update(int=int(bias[0]), float=float(bias[1]), has=1.0 in bias, array=bias.__array__().tolist())
        seen.update(mod=(bias % 2).tolist(), power=(2**bias).tolist(), floor=(bias // 2).tolist(), text=f"{bias[0]}")

    dist_load_into(WithPreHook(check_cancelled), saved(tmp_path, ONES))
    assert seen == {
        "ndim": 1, "size": 2, "device": torch.device("cpu"), "dim": 1, "numel": 2, "int": 1, "float": 1.0, "has": True,
        "array": [1.0, 1.0], "mod": [1.0, 1.0], "power": [2.0, 2.0], "floor": [0.0, 0.0], "text": "1.0",
    }  # fmt: skip


def test_what_a_module_keeps_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    def keep(module: Any, content: Any) -> None:
        module.kept = content.pop("cache")

    module = WithPreHook(keep)
    dist_load_into(module, saved(tmp_path, {**ONES, "cache": torch.ones(4)}))
    assert type(module.kept) is torch.Tensor and torch.equal(module.kept, torch.ones(4))


def test_what_is_kept_out_of_sight_outlives_the_load(tmp_path: Path) -> None:
    def keep(module: Any, content: Any) -> None:
        module.kept_in_a_list.append(content.pop("cache"))

    module = WithPreHook(keep)
    path = saved(tmp_path, {**ONES, "cache": torch.ones(4)})
    dist_load_into(module, path)
    gc.collect()
    path.write_bytes(bytes(path.stat().st_size))
    assert type(module.kept_in_a_list[0]) is torch.Tensor and torch.equal(module.kept_in_a_list[0], torch.ones(4))


def test_a_name_that_only_ends_like_extra_state(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Module()
        module.my_extra_state = nn.Parameter(torch.zeros(3))
    dist_load_into(module, saved(tmp_path, {"my_extra_state": torch.ones(3)}))
    assert torch.equal(module.my_extra_state, torch.ones(3))


def test_a_module_whose_load_state_dict_returns_nothing(tmp_path: Path) -> None:
    class Silent(nn.Linear):
        def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
            super().load_state_dict(*arguments, **keywords)

    module = Silent(3, 2)
    dist_load_into(module, saved(tmp_path, ONES))
    assert torch.equal(module.weight, ONES["weight"])
