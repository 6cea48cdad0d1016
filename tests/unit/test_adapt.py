"""Names are mapped, nothing is copied, and the old dict stays as it is."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

import rankload
from harness.ranks import run_ranks
from rankload import adapt


def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.fixture
def state_dict():
    return model().state_dict()


def test_strip_prefix_gives_what_the_module_itself_had(state_dict):
    wrapped = torch.nn.DataParallel(model()).state_dict()
    stripped = adapt.strip_prefix("module.")(wrapped)
    assert list(stripped) == list(state_dict) and all(name.startswith("module.") for name in wrapped)
    assert all(stripped[name] is wrapped[f"module.{name}"] for name in stripped)
    assert isinstance(stripped, OrderedDict)
    assert stripped._metadata["1"] == state_dict._metadata["1"] == {"version": 2}
    assert "module.1" in wrapped._metadata
    model().load_state_dict(stripped)


def test_version_of_a_module_survives_a_new_name():
    """Or batch norm would take its counters for missing."""
    renamed = adapt.rename(r"^1\.", "norm.")(model().state_dict())
    target = torch.nn.Sequential(OrderedDict([("0", torch.nn.Linear(3, 4)), ("norm", torch.nn.BatchNorm1d(4))]))
    del renamed["norm.num_batches_tracked"]
    assert target.load_state_dict(renamed, strict=False).missing_keys == ["norm.num_batches_tracked"]


def test_several_prefixes_in_order():
    found = adapt.strip_prefix("_orig_mod.", "module.")({"_orig_mod.module.a": 1, "module.b": 2, "c": 3})
    assert found == {"a": 1, "b": 2, "c": 3}


def test_names_that_would_meet_are_an_error():
    with pytest.raises(rankload.LoadError, match=r"'a' and 'module\.a' would both be named 'a'"):
        adapt.strip_prefix("module.")({"a": 1, "module.a": 2})


def test_add_rename_drop_and_keep():
    content = {"backbone.a": 1, "head.b": 2, "neck.c": 3}
    assert adapt.add_prefix("x.")(content) == {"x.backbone.a": 1, "x.head.b": 2, "x.neck.c": 3}
    assert adapt.rename(r"^(back)bone", r"\1")(content) == {"back.a": 1, "head.b": 2, "neck.c": 3}
    assert adapt.drop("^head", "^neck")(content) == {"backbone.a": 1}
    assert adapt.keep("^head", "^neck")(content) == {"head.b": 2, "neck.c": 3}
    assert adapt.drop()(content) == content and adapt.keep()(content) == {}
    with pytest.raises(rankload.ArgumentError, match="not a regular expression"):
        adapt.drop("(")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "model_state_dict"])
def test_unwrap_finds_the_usual_keys(state_dict, key):
    checkpoint = {"epoch": 3, "mean": torch.zeros(3), key: state_dict, "optimizer": {"state": {}}}
    assert adapt.unwrap()(checkpoint) is adapt.unwrap(key)(checkpoint) is state_dict


def test_unwrap_leaves_a_bare_state_dict_alone():
    bare = {"model.weight": torch.ones(1)}
    assert adapt.unwrap()(bare) is bare


def test_unwrap_of_a_whole_module(state_dict):
    assert list(adapt.unwrap()({"model": model()})) == list(state_dict)


@pytest.mark.parametrize("checkpoint", [{"weights": {}, "epoch": 1}, {}, [1], None])
def test_unwrap_says_what_is_there(checkpoint):
    with pytest.raises(rankload.LoadError, match=r"unwrap\('auto'\): .*('weights', 'epoch'|nothing|list|NoneType)"):
        adapt.unwrap()(checkpoint)
    with pytest.raises(rankload.LoadError, match=r"unwrap\('ema'\)"):
        adapt.unwrap("ema")(checkpoint)


def test_match_shapes_drops_what_does_not_fit_and_says_so(state_dict, caplog):
    state_dict["0.weight"] = torch.ones(5, 3)
    state_dict["other"] = torch.ones(1)
    found = adapt.match_shapes(model())(state_dict)
    assert {*state_dict} - {*found} == {"0.weight"}
    assert "dropped for their shapes: 0.weight [5, 3], not [4, 3]" in caplog.text
    assert model().load_state_dict(found, strict=False) == (["0.weight"], ["other"])


def test_match_shapes_on_meta(state_dict):
    with torch.device("meta"):
        target = model()
    assert dict(adapt.match_shapes(target)(state_dict)) == dict(state_dict)


ADAPTERS = {
    "unwrap": adapt.unwrap(),
    "strip_prefix": adapt.strip_prefix("module."),
    "add_prefix": adapt.add_prefix("module."),
    "rename": adapt.rename("a", "b"),
    "drop": adapt.drop("a"),
    "keep": adapt.keep("a"),
    "match_shapes": adapt.match_shapes({}),
    "to_dtype": adapt.to_dtype(torch.float16),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_no_dict_and_keys_that_are_no_names(name):
    with pytest.raises(rankload.LoadError, match=rf"^{name}.*expected a checkpoint that is a dict, got a list"):
        ADAPTERS[name]([torch.ones(1)])
    assert ADAPTERS[name]({0: (step := torch.tensor(1)), "a": torch.ones(1)})[0] is step


@pytest.mark.parametrize(("pattern", "replacement"), [("a", r"\2"), ("a", r"\g<name>"), ("a", "\\"), ("a", None)])
def test_rename_with_a_wrong_replacement(pattern, replacement):
    with pytest.raises(rankload.ArgumentError, match="rename"):
        adapt.rename(pattern, replacement)


def test_to_dtype_leaves_integers(state_dict):
    found = adapt.to_dtype(torch.bfloat16)(state_dict)
    assert found["0.weight"].dtype == torch.bfloat16 and found["1.num_batches_tracked"].dtype == torch.int64
    assert state_dict["0.weight"].dtype == torch.float32


def test_to_dtype_makes_leaves_and_keeps_ties(state_dict):
    weight, frozen = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3), requires_grad=False)
    plain = torch.randn(3, requires_grad=True)
    found = adapt.to_dtype(torch.float16)({"a": weight, "b": weight, "frozen": frozen, "plain": plain})
    assert found["a"] is found["b"] and all(tensor.is_leaf for tensor in found.values())
    assert [type(tensor) for tensor in found.values()] == [torch.nn.Parameter] * 3 + [torch.Tensor]
    assert [tensor.requires_grad for tensor in found.values()] == [True, True, False, True]
    assert torch.equal(found["a"], weight.half()) and found["plain"].dtype == torch.float16
    assert adapt.to_dtype(torch.float32)({"a": weight})["a"] is weight


def test_works_on_the_entries_of_an_opened_checkpoint(tmp_path, state_dict):
    torch.save({"model": torch.nn.DataParallel(model()).state_dict(), "epoch": 1}, tmp_path / "file")
    entries = rankload.open_checkpoint(tmp_path / "file").entries
    found = adapt.compose(adapt.unwrap("model"), adapt.strip_prefix("module."), adapt.match_shapes(model()))(entries)
    assert {name: entry.shape for name, entry in found.items()} == {n: tuple(t.shape) for n, t in state_dict.items()}


def load(rank, path):
    state_dict = rankload.dist_load_state_dict_from_url(path, adapt=[adapt.unwrap(), adapt.strip_prefix("module.")])
    model().load_state_dict(state_dict)
    return sorted(state_dict)


def test_as_an_argument_on_every_rank(tmp_path, state_dict):
    path = tmp_path / "file"
    torch.save({"model": torch.nn.DataParallel(model()).state_dict(), "epoch": 1}, path)
    assert [result.value for result in run_ranks(load, 2, args=(str(path),))] == [sorted(state_dict)] * 2


def load_wrongly(rank, path):
    with pytest.raises(rankload.RankloadError) as caught:
        rankload.dist_load_state_dict_from_url(path, adapt=adapt.unwrap("ema") if rank else None)
    return str(caught.value)


def test_failure_of_one_ranks_reaches_all(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "file")
    for result in run_ranks(load_wrongly, 2, args=(str(tmp_path / "file"),)):
        assert "unwrap('ema')" in result.value and "rank 1" in result.value


def test_argument_of_another_kind(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "file")
    with pytest.raises(rankload.ArgumentError, match="expected a function"):
        rankload.dist_load_state_dict_from_url(str(tmp_path / "file"), adapt=["module."])


class Described(dict[str, object]):
    """A dict with the attribute that nn.Module.state_dict sets on its own."""

    _metadata = {"": {"version": 1}}  # noqa: RUF012 - as torch has it


def test_a_dict_of_another_class_with_metadata_becomes_a_plain_one() -> None:
    assert adapt.strip_prefix("module.")(Described({"module.weight": 1})) == {"weight": 1}


def test_adapt_of_another_kind_is_an_argument_error() -> None:
    with pytest.raises(rankload.ArgumentError, match="adapt=5: expected a function"):
        adapt.as_adapter(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["unwrap", "strip_prefix", "add_prefix", "rename", "drop", "keep", "match_shapes", "to_dtype"]
)
def test_adapter_without_parentheses(name):
    with pytest.raises(rankload.ArgumentError, match=rf"adapt\.{name}\(…\)"):
        adapt.as_adapter(getattr(adapt, name))
    with pytest.raises(rankload.ArgumentError, match="call it"):
        adapt.as_adapter([adapt.unwrap(), getattr(adapt, name)])


def test_an_adapter_that_returns_nothing():
    def in_place(state_dict):
        state_dict.pop("a")

    with pytest.raises(rankload.ArgumentError, match=r"in_place: returned None"):
        adapt.compose(adapt.drop("b"), in_place)({"a": 1, "b": 2})
