"""Fine-tune a checkpoint from a URL with DistributedDataParallel: the script that all job templates run.

    torchrun --nproc-per-node=2 launch/train.py https://host/crepe_tiny-0a1b2c3d.pth --capacity tiny
    srun --ntasks=8 python launch/train.py https://host/crepe_tiny-0a1b2c3d.pth --capacity tiny

Copy it, and put your model and data where CREPE and the tones are. The loading stays one line.
"""

import argparse
import os
import socket
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from crepe import PITCH_BINS, Crepe, pitch_hz, tone
from rankload import dist_load_state_dict_from_url


def parse_arguments():
    parser = argparse.ArgumentParser(description="Fine-tune CREPE from the checkpoint at URL.")
    parser.add_argument("url", help="where the checkpoint is; its name carries its hash, as torch.hub's names do")
    parser.add_argument("--model-dir", help="cache directory, shared or node-local (default: torch.hub's)")
    parser.add_argument("--capacity", choices=["full", "tiny"], default="full", help="size of the model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("trained.pth"), help="rank 0 saves the model here")
    parser.add_argument(
        "--delivery",
        choices=["auto", "read", "broadcast"],
        default="auto",
        help="broadcast: rank 0 downloads, and sends the weights to the other nodes",
    )
    parser.add_argument("--no-check-hash", action="store_true", help="for a URL without a hash in its name")
    return parser.parse_args()


def describe_slurm_step():
    """Give a task that plain srun started the variables that torchrun would have set."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in os.environ:
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


def save_atomically(state_dict, path):
    """A job that is killed while it saves leaves the previous file, never half a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state_dict, partial)
    partial.replace(path)


def train():
    arguments = parse_arguments()
    describe_slurm_step()
    device = own_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    started = time.perf_counter()
    state_dict = dist_load_state_dict_from_url(
        arguments.url,
        model_dir=arguments.model_dir,
        check_hash=not arguments.no_check_hash,
        delivery=arguments.delivery,
    )
    seconds = time.perf_counter() - started

    model = Crepe(arguments.capacity)
    model.load_state_dict(state_dict)
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        samples, targets = (tensor.to(device) for tensor in tones(step))
        loss = binary_cross_entropy(model(samples), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rank, world_size = dist.get_rank(), dist.get_world_size()
    where = f"rank {rank} of {world_size} on {socket.gethostname()} ({device})"
    report = f"{where}: loaded in {seconds:.2f} s, {arguments.steps} steps, loss {loss.item():.4f}\n"
    # The newline in the same write: torchrun's ranks are unbuffered, and their lines would mix.
    print(report, end="", flush=True)
    if rank == 0:
        save_atomically(model.module.state_dict(), arguments.output)
    # Nobody leaves before all is saved. A rank that leaves right after its last step can also hang in its exit: torch's
    # gloo threads may not have let go of the last gradients, and for that they need the GIL (torch 2.13).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    train()
