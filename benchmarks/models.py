"""The models whose weights the module benchmarks load."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from benchmarks.transformer import Transformer

Model = Literal["transformer", "resnet"]

#: Blocks of ResNet-50: how many in each stage, and how wide (He et al., "Deep Residual Learning", table 1).
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))


def make(model: Model, layers: int, device: str = "cpu") -> nn.Module:
    """Make a module whose memory is touched; ``layers`` are the transformer's."""
    return Transformer(layers, device) if model == "transformer" else _resnet_50()


def _resnet_50() -> nn.Module:
    """Make what has ResNet-50's 320 tensors, by size and dtype; nobody runs it."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    channels = 64
    for blocks, width in _STAGES:
        for block in range(blocks):
            sizes = [(channels, width, 1), (width, width, 3), (width, 4 * width, 1)]
            sizes += [(channels, 4 * width, 1)] if block == 0 else []
            for inputs, outputs, size in sizes:
                layers += [nn.Conv2d(inputs, outputs, size, bias=False), nn.BatchNorm2d(outputs)]
            channels = 4 * width
    module = nn.Sequential(*layers, nn.Linear(2048, 1000))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
