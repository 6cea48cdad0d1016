"""The demo's output: plain text, at most 100 columns."""

from collections.abc import Callable, Sequence

from demo.outcome import JobReport, RankReport

WAYS = {
    "torch.hub": "torch.hub.load_state_dict_from_url on every rank",
    "rankload": "rankload.dist_load_state_dict_from_url on every rank",
}


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def job_lines(report: JobReport) -> list[str]:
    """One job: a row per rank and a line of totals."""
    lines = [_row("rank", "role", "device", "load call", "memory")]
    for rank in report.ranks:
        seconds, memory = _seconds(rank.seconds), megabytes(rank.held_bytes)
        lines.append(_row(str(rank.rank), _role(report, rank), rank.device, seconds, memory))
    totals = [
        f"slowest rank {_seconds(report.slowest_seconds)}",
        f"all ranks hold {megabytes(report.held_bytes)}",
    ]
    if report.served is not None:
        noun = "request" if report.served.requests == 1 else "requests"
        served = f"origin served {report.served.requests} {noun}, {megabytes(report.served.body_bytes)}"
        totals.insert(0, served)
    return [*lines, "  " + " | ".join(totals)]


def comparison_lines(hub: JobReport, rankload: JobReport) -> list[str]:
    """Both ways side by side, and by which factor rankload needs less."""
    rows: list[tuple[str, float, float, Callable[[float], str]]] = []
    if hub.served is not None and rankload.served is not None:
        rows.append(("requests to the origin", hub.served.requests, rankload.served.requests, _count))
        rows.append(("served by the origin", hub.served.body_bytes, rankload.served.body_bytes, megabytes))
    else:
        rows.append(("ranks that download", hub.downloading_ranks, rankload.downloading_ranks, _count))
    rows.append(("slowest rank", hub.slowest_seconds, rankload.slowest_seconds, _seconds))
    rows.append(("memory of all ranks", hub.held_bytes, rankload.held_bytes, megabytes))
    lines = [_columns("", hub.way, rankload.way, "rankload needs")]
    for what, before, after, form in rows:
        lines.append(_columns(what, form(before), form(after), _factor(before, after)))
    return lines


def agreement_lines(jobs: Sequence[JobReport]) -> list[str]:
    """What all ranks of all jobs were found to have in common."""
    first = jobs[0].ranks[0]
    ways = "in both ways" if len(jobs) == 2 else f"({jobs[0].way} only)"
    lines = [f"All ranks agree {ways}:", f"  the same {megabytes(first.weight_bytes)} of weights, bit by bit"]
    if first.pitch_hz is not None:
        lines.append(f"  the same forward pass: a 440 Hz tone is heard at {first.pitch_hz:.0f} Hz, the nearest bin")
        lines.append("  the same parameters after one DDP step")
    return lines


def memory_note(kind: str) -> str:
    """What the memory column means on this system."""
    note = f"memory: growth of the process over the load call ({kind}), all pages read, all ranks holding theirs"
    if kind == "RSS":
        note += "\n        (this system has no PSS: pages that ranks share count in full in each of them)"
    return note


def _role(report: JobReport, rank: RankReport) -> str:
    if rank.downloads:
        return "downloads"
    # With torch.hub a rank that did not download came late and found another's file; there is no waiting.
    # With rankload none downloads when the source is a file on this machine.
    is_waiting = report.way == "rankload" and report.downloading_ranks > 0
    return "waits" if is_waiting else "reads the file"


def _factor(before: float, after: float) -> str:
    if before <= 0 or after <= 0:
        return ""
    if f"{before:.2g}" == f"{after:.2g}":
        return "the same"
    # Told as it is, whichever way it went.
    return f"{before / after:.1f}x less" if before >= after else f"{after / before:.1f}x more"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _row(*cells: str) -> str:
    rank, role, device, *numbers = cells
    return f"  {rank:<6}{role:<16}{device:<10}" + "".join(f"{number:>12}" for number in numbers)


def _columns(*cells: str) -> str:
    what, *values = cells
    return f"  {what:<26}" + "".join(f"{value:>16}" for value in values)
