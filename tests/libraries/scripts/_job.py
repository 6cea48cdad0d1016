"""What every script here begins and ends with: a process group, and one line that says what this rank has."""

import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

if torch.version.cuda is None:
    # The wheels of torchvision and torchaudio are for CUDA: with a CPU build of torch their operators cannot be loaded.
    # No script here needs one, but importing torchvision needs the names of two. torchaudio can do without its files.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _glob = Path.glob
    Path.glob = lambda self, pattern: iter(()) if str(self).endswith("torchaudio/lib") else _glob(self, pattern)


def start():
    """Initialise the process group that training scripts have."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")


def finish(model):
    """Print the digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    print(f"weights: {digest.hexdigest()}", flush=True)
    if "RANK" in os.environ:
        dist.barrier()
        dist.destroy_process_group()
