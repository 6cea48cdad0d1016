"""`dist_snapshot`: a repository of the Hugging Face Hub on every rank, by huggingface_hub's own means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankload._api.call import collective_call
from rankload._api.tracebacks import short_tracebacks
from rankload._cache.directory import make_directory
from rankload._fetch.cache_domain import find_domain
from rankload._fetch.request import A_HEADER_VALUE, is_header_value
from rankload._types import Progress
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@short_tracebacks
def dist_snapshot(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    ignore_patterns: str | Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    timeout: float | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """Download a repository of the Hugging Face Hub once for all ranks that share its cache; return its directory.

    For ``from_pretrained``, with configuration, tokenizer and weights:
    ``AutoModel.from_pretrained(dist_snapshot("org/name"))``.

    **Collective** over the ranks of ``group``, else of the default process group, else of the launcher's job, like
    `rankload.dist_load_state_dict_from_url`. One rank of each group of ranks that share huggingface_hub's cache calls
    ``huggingface_hub.snapshot_download``, with its downloader and its layout. All ranks get the same commit: the one
    that rank 0's was.

    Args:
        repo_id: ``org/name``. This one and the next six are those of ``huggingface_hub.snapshot_download``.
        revision: branch, tag or commit.
        repo_type: ``"dataset"``, ``"space"``, or None for models.
        allow_patterns: patterns of the files to download; default: all.
        ignore_patterns: patterns of files to leave out.
        cache_dir: huggingface_hub's cache. May differ between ranks.
        token: token for the Hub. May differ between ranks.
        timeout: no-progress deadline in seconds for the other steps; the download may take as long as its process
            lives.
        group: process group of the ranks that make this call.

    Returns:
        The directory of the snapshot on this node.

    Raises:
        ArgumentError: an argument is invalid.
        FetchError: the Hub does not answer, or has no such repository or revision; the same on every rank.
        OfflineError: offline mode is on, and the snapshot is not in the cache.
        RankloadError: any other failure; the same on every rank.
    """
    with collective_call(group, timeout) as call:
        if not isinstance(repo_id, str) or not repo_id:
            raise ArgumentError(f"repo_id={repo_id!r}: expected org/name")
        if isinstance(token, str) and not is_header_value(token):  # the HTTP library's error would show it
            raise ArgumentError(f"token: expected {A_HEADER_VALUE}")
        patterns = {"allow": _listed(allow_patterns), "ignore": _listed(ignore_patterns)}
        arguments = {"call": "snapshot", "repo_id": repo_id, "revision": revision, "repo_type": repo_type, **patterns}
        call.channel.agree(arguments)
        from rankload._fetch.hub_layout import cache_directory  # imports huggingface_hub
        from rankload._fetch.hub_snapshot import download_snapshot

        directory = Path(cache_dir).expanduser().absolute() if cache_dir else cache_directory()
        make_directory(directory)
        domain = find_domain(call.channel, "auto", directory)
        if not domain.is_leader:
            return Path(call.channel.wait_for(f"snapshot/{domain.key}", from_rank=domain.leader)["path"])
        options: dict[str, Any] = {
            "repo_type": repo_type,
            "allow_patterns": patterns["allow"],
            "ignore_patterns": patterns["ignore"],
            "token": token,
        }
        call.report(Progress("running"))
        path = download_snapshot(repo_id, revision, directory, call.settings, **options)
        if call.identity.rank == 0:
            call.channel.post("snapshot/commit", {"commit": path.name})
        elif (commit := call.channel.wait_for("snapshot/commit", from_rank=0)["commit"]) != path.name:
            call.report(Progress("running"))
            path = download_snapshot(repo_id, commit, directory, call.settings, **options)
        call.channel.post(f"snapshot/{domain.key}", {"path": str(path)})
        return path


def _listed(patterns: str | Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
