"""One answer for all nodes of a call to a question that each could ask, such as which files the Hub lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rankload._coordination.channel import Channel
from rankload.errors import FetchError, FetchTimeoutError, NetworkError, OfflineError

#: After these errors another node may have more success.
_UNREACHABLE = (NetworkError, FetchTimeoutError, OfflineError)


def first_answer(
    key: str, leaders: Sequence[int], channel: Channel, ask: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """Return the first leader's answer; if it does not reach the service, that of the next leader that has one.

    So a service is asked once per job, also if it is busy, or says no. Collective over the leaders.

    Args:
        key: key of the question in the call.
        leaders: ranks that have the question, the same list on all of them.
        channel: channel of the call.
        ask: returns this node's answer, as JSON. Its argument is whether to retry after temporary failures. A node that
            does not reach the service does so only if no other node reaches it either.

    Raises:
        FetchError: nobody has an answer; this node's own error, if it has asked. Or the service says no.
        RankloadError: any error of another rank.
    """
    rank, first = channel.identity.rank, leaders[0]
    error: FetchError | None = None

    def attempt() -> dict[str, Any]:
        """Return this node's answer, or None and whether it is worth while to ask again."""
        nonlocal error
        try:
            return {"answer": ask(False)}
        except FetchError as failure:
            if failure.is_from_another_rank:
                raise
            if not isinstance(failure, _UNREACHABLE):
                return {"answer": ask(True)}
            error = failure
            return {"answer": None, "may_ask_again": not isinstance(failure, OfflineError)}

    if rank == first:
        found = {first: attempt()}
        channel.post(f"{key}/{first}", found[first])
        if found[first]["answer"] is not None:
            return found[first]["answer"]  # type: ignore[no-any-return]
        found |= {other: channel.wait_for(f"{key}/{other}", from_rank=other) for other in leaders if other != first}
        answer = next((one["answer"] for one in found.values() if one["answer"] is not None), None)
        asker = next((one for one in found if answer is None and found[one]["may_ask_again"]), None)
        channel.post(key, {"answer": answer, "asker": asker})
    else:
        answer, asker = channel.wait_for(f"{key}/{first}", from_rank=first)["answer"], None
        if answer is None:
            channel.post(f"{key}/{rank}", attempt())
            verdict = channel.wait_for(key, from_rank=first)
            answer, asker = verdict["answer"], verdict["asker"]
    if asker == rank:
        answer = ask(True)
        channel.post(f"{key}/again", {"answer": answer})
    elif asker is not None:
        answer = channel.wait_for(f"{key}/again", from_rank=asker)["answer"]
    if answer is None:
        assert error is not None
        raise error
    return answer  # type: ignore[no-any-return]
