"""Fine-tune a checkpoint from a URL with DistributedDataParallel: the script that all job templates run.

    torchrun --nproc-per-node=2 launch/train.py https://host/crepe_tiny-0a1b2c3d.pth --capacity tiny
    srun --ntasks=8 python launch/train.py https://host/crepe_tiny-0a1b2c3d.pth --capacity tiny

The other files of launch/ and slurm/ start it by mpirun, submitit, Ray, Kubernetes and sbatch.

Copy it, and put your model and data where CREPE and the tones are. The loading stays one line.

With --checkpoint it saves its state now and then, and when SIGTERM comes: before the time limit, or when the job has to
make way for another. The same command then goes on from there.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from crepe import PITCH_BINS, Crepe, pitch_hz, tone
from rankload import dist_load_state_dict_from_url


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(description="Fine-tune CREPE from the checkpoint at URL.")
    parser.add_argument("url", help="where the weights are; a hash in the name (model-0a1b2c3d.pth) is checked")
    parser.add_argument("--model-dir", help="cache directory, shared or node-local (default: torch.hub's)")
    parser.add_argument("--capacity", choices=["full", "tiny"], default="full", help="size of the model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="save model, optimizer and step here, and go on from there")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="between two of these")
    parser.add_argument("--output", type=Path, default=Path("trained.pth"), help="rank 0 saves the model here")
    parser.add_argument(
        "--delivery",
        choices=["auto", "read", "broadcast"],
        default="auto",
        help="broadcast: rank 0 downloads, and sends the weights to the other nodes",
    )
    parser.add_argument("--no-check-hash", action="store_true", help="for a name whose digits are no hash, but a date")
    return parser.parse_args(words)


# Rank, number of ranks and local rank, as Open MPI, MPICH or Intel MPI, and srun call them. srun comes last: an mpirun
# in a SLURM job starts its own daemons by srun, and they leave SLURM's variables to the ranks.
LAUNCHER_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def describe_rank():
    """Give a rank that mpirun or plain srun started the variables that torchrun would have set."""
    names = next((names for names in LAUNCHER_VARIABLES if all(name in os.environ for name in names)), None)
    if "RANK" in os.environ or names is None:
        return
    for variable, name in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True):
        os.environ[variable] = os.environ[name]
    if "MASTER_ADDR" not in os.environ:  # launch/mpirun.sh sets it
        # The step's list, not the job's: a step on part of the job has its rank 0 elsewhere.
        list_hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.check_output(list_hosts, text=True).split()[0]
    # Two jobs may share a node. Ports from 32768 on are the kernel's to give to outgoing connections.
    os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def own_device():
    """This rank's GPU: the only visible one (srun --gpus-per-task), else the one with the local rank's number."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = 0 if torch.cuda.device_count() == 1 else int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def tones(step, batch_size=8):
    """One batch: tones as (batch_size, 1024) samples, their pitches as (batch_size, 360) targets."""
    first = step * dist.get_world_size() + dist.get_rank()
    bins = torch.arange(first, first + 37 * batch_size, 37) % PITCH_BINS
    targets = one_hot(bins, PITCH_BINS).float()
    return torch.cat([tone(hz) for hz in pitch_hz(targets).tolist()]), targets


def save_atomically(state, path):
    """A job that is killed while it saves leaves the previous file, never half a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # a node that loses power may otherwise keep the new name, and nothing in it
    partial.replace(path)


class Stop:
    """Whether SIGTERM has come to any rank."""

    def __init__(self):
        self.requested = False
        if threading.current_thread() is threading.main_thread():  # Ray's workers train on another one
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        self.requested = True

    def is_agreed(self, device):
        """All ranks stop after the same step: one that stopped alone would leave the others waiting for it."""
        requested = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(requested, dist.ReduceOp.MAX)
        return bool(requested.item())


def is_there(path):
    """Whether rank 0 sees the file: ranks that looked for themselves might not agree."""
    answer = [path is not None and path.exists()]
    dist.broadcast_object_list(answer)
    return answer[0]


def leave(device):
    """End the process group once all ranks have saved what they save."""
    dist.barrier()
    dist.destroy_process_group()
    if device.type == "cpu":
        # gloo's threads let go of a collective's tensors a little after its end, and need the GIL for that. A process
        # that ends before, on a busy machine, hangs or aborts (pytorch#190489).
        time.sleep(1)


def load(arguments):
    """The state to begin with: what an earlier run has saved, or the weights from the URL."""
    if is_there(arguments.checkpoint):
        return dist_load_state_dict_from_url(str(arguments.checkpoint), map_location="cpu")
    has_hash = re.search(r"-[0-9a-f]{8,}\.[^/]*$", arguments.url.partition("?")[0]) is not None
    weights = dist_load_state_dict_from_url(
        arguments.url,
        model_dir=arguments.model_dir,
        check_hash=has_hash and not arguments.no_check_hash,
        delivery=arguments.delivery,
    )
    return {"step": 0, "model": weights}


def train(words=None):
    """Train as the words of a command line say; None stands for this process's."""
    arguments = parse_arguments(words)
    describe_rank()
    device = own_device()
    if not dist.is_initialized():  # Ray has made a process group already
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    started = time.perf_counter()
    state = load(arguments)
    seconds = time.perf_counter() - started

    stop = Stop()  # not before: until then rankload ends the call on all ranks when SIGTERM comes
    model = Crepe(arguments.capacity)
    model.load_state_dict(state["model"])
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    first = state["step"]
    if first:
        optimizer.load_state_dict(state["optimizer"])

    def save(step):
        state = {"step": step, "model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        if rank == 0:
            save_atomically(state, arguments.checkpoint)
        dist.barrier()

    loss = torch.tensor(float("nan"))
    for step in range(first, arguments.steps):
        samples, targets = (tensor.to(device) for tensor in tones(step))
        loss = binary_cross_entropy(model(samples), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if arguments.checkpoint is None:
            continue
        is_over = stop.is_agreed(device)
        if is_over or (step + 1) % arguments.save_every == 0:
            save(step + 1)
        if is_over:
            print(f"rank {rank}: saved after step {step + 1} of {arguments.steps}, and stopped\n", end="", flush=True)
            leave(device)
            sys.exit(128 + signal.SIGTERM)

    where = f"rank {rank} of {world_size} on {socket.gethostname()} ({device})"
    steps = f"steps {first} to {arguments.steps}" if first else f"{arguments.steps} steps"
    report = f"{where}: loaded in {seconds:.2f} s, {steps}, loss {loss.item():.4f}\n"
    # The newline in the same write: torchrun's ranks are unbuffered, and their lines would mix.
    print(report, end="", flush=True)
    if rank == 0:
        save_atomically(model.module.state_dict(), arguments.output)
        if arguments.checkpoint is not None:
            arguments.checkpoint.unlink(missing_ok=True)
    leave(device)


if __name__ == "__main__":
    train()
