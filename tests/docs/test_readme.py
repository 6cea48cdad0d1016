"""README is short, true, and fit for a package index."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from docs.example_world import ROOT
from harness.checkpoints import CheckpointFile
from harness.origin import Origin
from harness.ranks import run_ranks

README = ROOT / "README.md"

sys.path.insert(0, str(ROOT / "docs" / "hooks"))

from repository_links import absolute_links  # noqa: E402 - the path comes first

_REPOSITORY = "https://code.example.org/rankload"


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_two_commands_are_on_the_first_screen() -> None:
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:30])
    assert "./launch/demo.sh" in first_screen and "./tests/run.sh" in first_screen


def _load(rank: int, url: str) -> None:
    import rankload

    rankload.dist_load_state_dict_from_url(url, check_hash=True)


def _without_what_differs(line: str) -> str:
    """A line without addresses, file names, hosts, sizes and times."""
    line = re.sub(r"http://127\.0\.0\.1:\d+/[\w.-]+", "URL", line)
    line = re.sub(r"rankload: [\w-]+\.pth:.*", "rankload: FILE", line)
    return re.sub(r" on [\w.-]+(?=[];])", " on HOST", line)


def _quoted_output() -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [_without_what_differs(line) for block in blocks for line in block.splitlines()]


def test_two_ranks_write_what_it_quotes(
    origin: Origin, checkpoint: CheckpointFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # a download that is over within a second has one line
    url = origin.add(checkpoint.name, checkpoint.path, bytes_per_second=checkpoint.size / 1.5)
    written = "".join(result.stderr for result in run_ranks(_load, 2, args=(url,)))
    assert [_without_what_differs(line) for line in written.splitlines()] == _quoted_output()[:2]


def test_all_ranks_print_the_error_that_it_quotes(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    url = origin.url("crepe_full-13322560.pth")
    origin.__exit__(None, None, None)
    results = run_ranks(_load, 2, args=(url,))
    printed = [result.exception.traceback.splitlines() for result in results if result.exception is not None]
    last_lines = [line for lines in printed for line in lines[-2:] if not line.startswith(" ")]
    quoted = _quoted_output()[2:]
    if sys.version_info < (3, 11):  # no notes there
        quoted = [line for line in quoted if not line.startswith("What it means")]
    assert [_without_what_differs(line) for line in last_lines] == quoted


def test_links_become_absolute_for_a_package_index() -> None:
    text = absolute_links(README.read_text(encoding="utf-8"), _REPOSITORY)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    assert targets and all(target.startswith(f"{_REPOSITORY}/") for target in targets)
    assert f"{_REPOSITORY}/blob/main/docs/differences.md" in targets
    assert f"{_REPOSITORY}/raw/main/docs/assets/overview.svg" in targets


def test_links_become_texts_where_the_address_is_not_known() -> None:
    text = absolute_links("See [the *page*](docs/a.md#b), ![chart](c.svg) [x](https://h/).\n```sh\n[a](b)\n```\n", "")
    assert text == "See the *page*,  [x](https://h/).\n```sh\n[a](b)\n```\n"
