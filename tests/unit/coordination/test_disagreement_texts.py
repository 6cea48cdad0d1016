"""What two ranks hear whose arguments differ."""

from __future__ import annotations

from typing import Any

import pytest

from rankload._coordination.disagreement import advice_on, describe_disagreement
from rankload._fetch.request import agreed_arguments, make_request
from rankload._settings import Settings

pytestmark = pytest.mark.fault(86)


def arguments(url: Any) -> dict[str, Any]:
    request = make_request(
        url, "/cache", check_hash=False, file_name="x.pth", progress=False, sha256=None, headers=None, scope="auto",
        verify="once", offline=False, must_be_checkpoint=True, max_bytes=None, refresh=False, settings=Settings(),
    )  # fmt: skip
    return agreed_arguments(request, "load")


@pytest.mark.parametrize(
    ("first", "mine", "told"),
    [
        ("part=SECRET0&v=1", "part=SECRET1&v=1", "its query: 'part'"),
        ("v=1", "v=1&part=SECRET", "its query: 'part'"),
        ("b=SECRET&a=SECRET", "a=OTHER", "its query: 'a', 'b'"),
        ("SECRET0", "SECRET1", "its query: a part without a name"),
        ("SECRET0=", "SECRET1==", "its query: a part without a name"),
        ("SECRET" * 10 + "=1", "v=1", "its query: 'v', a part without a name"),
        ("a=1&b=2", "b=2&a=1", "its query, user or fragment"),
    ],
)
def test_parameters_of_a_query_are_named_without_values(first, mine, told):
    url = "https://host/x.pth"
    text = describe_disagreement(arguments(f"{url}?{first}"), 0, arguments(f"{url}?{mine}"), 3)
    assert text.endswith(told) and "SECRET" not in text
    assert text.startswith(f"url: rank 0 has ['{url}?…'], rank 3 has another one, which differs in ")


def test_signatures_make_no_difference():
    urls = [f"https://host/x.pth?X-Amz-Signature={n}&X-Amz-Date={n}&token={n}" for n in (1, 2)]
    assert describe_disagreement(arguments(urls[0]), 0, arguments(urls[1]), 1) == ""
    assert advice_on(arguments(urls[0]), arguments(urls[1])) == ""


@pytest.mark.parametrize(
    ("first", "mine", "call"),
    [
        ("/runs/rank0.pth", "/runs/rank1.pth", "rankload.load(path)"),
        ("file:///runs/rank0.pth", "/runs/rank1.pth", "rankload.load(path)"),
        ("https://host/x0.pth", "https://host/x1.pth", "rankload.hub.load_state_dict_from_url(url)"),
        ("https://host/x.pth?n=0", "https://host/x.pth?n=1", "rankload.hub.load_state_dict_from_url(url)"),
    ],
)
def test_a_file_for_each_rank_has_a_call_of_its_own(first, mine, call):
    first, mine = arguments(first), arguments(mine)
    assert "origin" not in describe_disagreement(first, 0, mine, 1)
    assert f"call {call}, which is not collective" in advice_on(first, mine)


def test_other_arguments_have_no_advice():
    mine = {**arguments("https://host/x.pth"), "scope": "node"}
    first = arguments("https://host/x.pth")
    assert describe_disagreement(first, 0, mine, 2) == "scope: rank 0 has 'auto', rank 2 has 'node'"
    assert advice_on(first, mine) == ""
