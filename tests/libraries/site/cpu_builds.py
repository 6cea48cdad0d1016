"""Lets torchvision and torchaudio be imported with a CPU build of torch.

Their wheels are for CUDA, so that their operators cannot be loaded. No script here needs one; but importing torchvision
needs the names of two, and torchaudio can do without its files.
"""

from pathlib import Path

import torch

if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _glob = Path.glob
    Path.glob = lambda self, pattern: iter(()) if str(self).endswith("torchaudio/lib") else _glob(self, pattern)
