"""One rank of the demo's job, started by torchrun: it loads, measures, and leaves a JSON report."""

import argparse
import collections
import functools
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from crepe import PITCH_BINS, Crepe, pitch_hz, tone
from demo import memory
from demo.fingerprint import fingerprint, tensor_bytes
from demo.outcome import RankReport

# Concert pitch: a fixed input whose right answer everybody knows.
_TONE_HZ = 440.0

# A SHA-256 in hex.
_AGREED_CHARACTERS = 64


class RanksDisagree(RuntimeError):
    """Ranks that must hold the same hold different things."""


def agreed(what: str, mine: str) -> str:
    """Returns ``mine``, ASCII of at most 64 characters, if every rank passed the same. Collective.

    Raises:
        RanksDisagree: On every rank, naming who has what.
    """
    # As a tensor: torch's object collectives need numpy, which torch does not install.
    padded = torch.tensor(list(mine.encode("ascii").ljust(_AGREED_CHARACTERS)), dtype=torch.uint8)
    everyones = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, padded)
    holders = collections.defaultdict(list)
    for rank, theirs in enumerate(everyones):
        holders[bytes(theirs.tolist()).decode("ascii").rstrip()].append(str(rank))
    if len(holders) > 1:
        told = "; ".join(f"rank {', '.join(ranks)}: {value}" for value, ranks in holders.items())
        raise RanksDisagree(f"the ranks disagree on {what} ({told})")
    return mine


class Connections:
    """Counts the TCP connections that this process opens from Python, which tells who downloads.

    The process group and its store connect from C++ and are not counted.
    """

    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            sock = arguments[0]
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                self.count += 1


def own_device() -> torch.device:
    """This rank's accelerator, shared when there are fewer than ranks; the CPU where gloo has no other."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def loader(way: str) -> Callable[..., Any]:
    """The call that the two jobs differ in."""
    if way == "torch.hub":
        # By default torch.hub runs code that a checkpoint carries; the demo does not, whatever the URL.
        return functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    from rankload import dist_load_state_dict_from_url

    return dist_load_state_dict_from_url


def use_model(state_dict: Any, capacity: str, device: torch.device) -> float:
    """Puts the weights to work: strict load, a forward pass, one DDP step. Collective.

    Returns:
        The pitch in Hz that every rank heard in the fixed tone.

    Raises:
        RanksDisagree: On their outputs, or on the parameters after the step.
    """
    model = Crepe(capacity)
    model.load_state_dict(state_dict, strict=True)
    model.to(device).eval()
    with torch.inference_mode():
        activations = model(tone(_TONE_HZ).to(device)).cpu()
    everyones = [torch.empty_like(activations) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, activations)
    for rank, theirs in enumerate(everyones):
        # Not bit by bit: GPUs of different models round differently.
        if not torch.allclose(theirs, everyones[0], atol=1e-4):
            raise RanksDisagree(f"ranks 0 and {rank} disagree on the output of the forward pass")

    # Each rank hears another note, so equal parameters afterwards mean that DDP averaged their gradients.
    frames = tone(_TONE_HZ * 2 ** (dist.get_rank() / 12), batch=2).to(device)
    target = one_hot(torch.full((2,), PITCH_BINS // 2), PITCH_BINS).float().to(device)
    replica = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.01)
    binary_cross_entropy(replica(frames), target).backward()
    optimizer.step()
    agreed("the parameters after a DDP step", fingerprint(dict(model.named_parameters())))
    return pitch_hz(activations).item()


def measure(options: argparse.Namespace, device: torch.device) -> RankReport:
    """Loads between two barriers and says what that took. Collective."""
    # Imported before the clock starts, as at the top of a training script.
    load = loader(options.way)
    keywords: dict[str, Any] = {"check_hash": options.check_hash, "progress": False}
    if not options.capacity:
        # A checkpoint nobody has seen may name GPUs that this machine lacks; torch.hub's default fails there.
        keywords["map_location"] = "cpu"
    connections = Connections()
    gc.collect()
    dist.barrier()
    before_bytes = memory.held_bytes()
    dist.barrier()
    started = time.monotonic()
    state_dict = load(options.url, **keywords)
    seconds = time.monotonic() - started
    # Reads every page, so that what is mapped but not yet in memory counts too.
    weights = fingerprint(state_dict)
    weight_bytes = tensor_bytes(state_dict)
    gc.collect()
    # PSS depends on who else maps a page: all have loaded before one measures, and stay until all have.
    dist.barrier()
    held_bytes = memory.held_bytes() - before_bytes
    dist.barrier()

    agreed("the weights", weights)
    pitch = use_model(state_dict, options.capacity, device) if options.capacity else None
    return RankReport(
        rank=dist.get_rank(),
        downloads=connections.count > 0,
        device=str(device) if options.capacity else "cpu",
        seconds=seconds,
        held_bytes=held_bytes,
        memory_kind=memory.kind(),
        weight_bytes=weight_bytes,
        fingerprint=weights,
        pitch_hz=pitch,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=("torch.hub", "rankload"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--capacity", help="CREPE's, to build and use the model; without it only load")
    parser.add_argument("--check-hash", action="store_true")
    parser.add_argument("--reports-dir", type=Path, required=True)
    return parser.parse_args()


def _run() -> None:
    options = _parse()
    path = options.reports_dir / f"rank-{os.environ['RANK']}.json"
    dist.init_process_group("gloo")
    try:
        report = measure(options, own_device())
    except Exception as error:
        path.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    path.write_text(report.to_json())
    dist.barrier()  # see train.py: a rank that leaves right after a DDP step can hang
    dist.destroy_process_group()


if __name__ == "__main__":
    _run()
